"""Checks and judgements are made in float32, whatever TF32 may do elsewhere; the caller's flags come back."""

import os
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import nothing_waits, process_state_restored
from support.fallbacks import CollectedIn
from support.networks import tiny_cnn
from support.process_snapshot import snapshot
from support.tf32_sim import SimulatedTF32, rounded
from torch import Tensor, nn

from fastdynat import PGD
from fastdynat.attack_engine import network_comparison as answers
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.attacks import parse_attack
from fastdynat.data import ImageSet
from fastdynat.evaluation import AutoAttack, measure
from fastdynat.evaluation.fidelity import check_fidelity
from fastdynat.execution.compiling import compile_whole
from fastdynat.execution.float32 import (
    LEAVES,
    float32_flags,
    float32_name,
    full_float32,
    put_float32_flags,
    tf32_allowed,
)
from fastdynat.execution.process_state import process_state_kept
from fastdynat.models import build_model

C: Any = torch._C
KEYS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *LEAVES]


def seen() -> dict[Any, Any]:
    """All readable precision flags; the older interface refuses where the newer one contradicts it."""
    found: dict[Any, Any] = {key: C._get_fp32_precision_getter(*key) for key in KEYS}
    for read in (C._get_cudnn_allow_tf32, C._get_cublas_allow_tf32, C._get_float32_matmul_precision):
        try:
            found[read.__name__] = read()
        except RuntimeError as error:
            found[read.__name__] = str(error).partition(".")[0]
    return found


def actions() -> list[Callable[[], Any]]:
    """Every way to set a flag, through either interface."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found: list[Callable[[], Any]] = []
    for on in (True, False):
        found += [
            lambda on=on: setattr(cudnn, "allow_tf32", on),
            lambda on=on: setattr(matmul, "allow_tf32", on),
        ]
    found += [lambda p=p: torch.set_float32_matmul_precision(p) for p in ("highest", "high", "medium")]
    for key in KEYS:
        for value in ("none", "ieee", "tf32", *(["bf16"] if key[0] == "mkldnn" else [])):
            found.append(lambda key=key, value=value: C._set_fp32_precision_setter(*key, value))
    return found


def test_any_mixture_of_both_interfaces_is_switched_off_and_put_back() -> None:
    choose, begun, ways = random.Random(0), float32_flags(), actions()
    try:
        for _ in range(500):
            choose.choice(ways)()
            before = seen()
            with full_float32():
                within = seen()
                assert all(within[leaf] == "ieee" for leaf in LEAVES)
                assert [within[name] for name in within if isinstance(name, str)] == [False, False, "highest"]
                with full_float32():
                    assert seen() == within
                assert seen() == within
            assert seen() == before
            with process_state_kept():
                choose.choice(ways)()
            assert seen() == before
    finally:
        put_float32_flags(begun)


def test_flags_come_back_after_a_failure() -> None:
    before = seen()
    with pytest.raises(ZeroDivisionError), full_float32():
        _ = 1 / 0
    assert seen() == before
    assert tf32_allowed()  # torch's default, which the tests below rest on


def test_rounding_is_that_of_ten_bits() -> None:
    x = torch.tensor(
        [1.0, 1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-20, -3.1415927, 0.0]
    )
    want = torch.tensor([1.0, 1 + 2.0**-10, 1.0, 1 + 2 * 2.0**-10, 1 + 2.0**-10, -3.140625, 0.0])
    assert torch.equal(rounded(x), want)
    model, y = nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8)
    with SimulatedTF32() as gpu:
        coarse, exact = model(y), model.double()(y.double()).float()
        model.float()
        with full_float32():
            torch.testing.assert_close(model(y), exact)
    assert not torch.allclose(coarse, exact)
    assert (gpu.rounded, gpu.full) == (1, 1)


def trained() -> tuple[nn.Module, Tensor]:
    """A ResNet-18 whose running statistics are those of images, and two images."""
    shape, mean, std = (3, 16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    model = build_model("resnet18", num_classes=10, image_shape=shape, mean=mean, std=std).train()
    for layer in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        layer.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(8, *shape))
    return model, torch.rand(2, *shape)


def test_batch_norm_is_folded_on_a_gpu_whose_convolutions_are_tf32() -> None:
    model, x = trained()
    with SimulatedTF32() as gpu:
        replica = AttackReplica(model, x)
    assert (replica.note, replica.num_folded) == ("", 20)
    assert gpu.rounded == 0


def test_without_full_float32_that_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation is as coarse as the GPU: two ways to a gradient differ beyond the tolerance."""
    model, x = trained()
    monkeypatch.setattr(answers, "full_float32", nullcontext)
    monkeypatch.setattr(AttackReplica, "__init__", AttackReplica.__init__.__wrapped__)  # type: ignore[attr-defined]
    with SimulatedTF32() as gpu:
        replica = AttackReplica(model, x)
    assert gpu.rounded > 0
    assert (replica.num_folded, "differ" in replica.note) == (0, True)


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 10


def test_fidelity_compares_the_attack_as_it_is_with_one_in_full_float32() -> None:
    model, (x, y) = tiny_cnn(0).eval(), images()
    spec = PGDSpec(0.1, 0.02, 3)
    with SimulatedTF32() as gpu:
        engine = AttackEngine(model, x[:2])
        gpu.rounded = gpu.full = 0
        check_fidelity(engine, model, [(x, y)], spec)
    assert gpu.rounded > 0, "the engine's attack runs as training runs it"
    assert gpu.full > gpu.rounded, "the reference and the judge do not"


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
def test_what_is_measured_is_measured_in_float32(matmul: str) -> None:
    """Validation calls `measure` as it is; AutoAttack is a library's entry point."""
    model, (x, y) = tiny_cnn(0).eval(), images()
    data, attack = (
        ImageSet((255 * x).to(torch.uint8), y),
        parse_attack("pgd3", eps=0.1, step_size=0.03, norm="linf"),
    )
    device, begun = torch.device("cpu"), float32_flags()
    try:
        torch.set_float32_matmul_precision(matmul)
        with SimulatedTF32() as gpu:
            measure(model, data, attack, device=device, batch_size=4, seed=1)
            AutoAttack(
                model, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False
            ).run_standard_evaluation(x, y)
    finally:
        put_float32_flags(begun)
    assert gpu.rounded == 0
    assert gpu.full > 0


def test_a_drop_in_attacks_check_is_in_float32_and_its_attack_is_the_callers() -> None:
    model, (x, y) = tiny_cnn(0).eval(), images()
    with SimulatedTF32() as gpu, warnings.catch_warnings():
        warnings.simplefilter("error")
        attack = PGD(model, eps=0.1, steps=2)
        attack(x, y)
    assert gpu.rounded > 0
    assert gpu.full > 0


def test_the_name_says_what_torch_makes_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (float32_name(gpu), float32_name(cpu)) == ("float32 (TF32 convolutions)", "float32")
    with full_float32():
        assert float32_name(gpu, "fp32") == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert float32_name(gpu) == "float32"


def test_inductors_advice_on_tf32_ends_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's words, under the filter of a strict caller."""
    advice = (
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. "
        "Consider setting `t"
    )
    whole, said, compiled = torch.compile, [], []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(1)
        warnings.warn(advice, stacklevel=2)
        return graph

    monkeypatch.setattr(torch, "compile", lambda fn, options, **kwargs: whole(fn, backend=backend, **kwargs))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        product = compile_whole(
            lambda a: a @ a, mode="default", what="the product", fallbacks=CollectedIn(said)
        )
        a = torch.rand(3, 3)
        assert torch.equal(product(a), a @ a)
        assert warnings.filters == filters
    assert (compiled, said) == ([1], [])


def test_waiting_is_refused_and_the_mode_put_back_under_strict_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch warns before it sets the mode."""
    modes = ["default"]

    def turn(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", turn)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), nothing_waits():
            _ = 1 / 0
    assert modes == ["default", "error", "default"]


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
        lambda: os.environ.update(CUBLAS_WORKSPACE_CONFIG=":16:8"),
        lambda: os.chdir("/"),
    ],
)
def test_a_test_that_fails_half_way_leaves_the_process_as_it_was(change: Callable[[], None]) -> None:
    before = snapshot()

    def fail() -> None:
        change()
        assert snapshot() != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), process_state_restored():
        fail()
    after = snapshot()
    assert [name for name in before if before[name] != after[name]] == []


def test_pgd_itself_leaves_the_precision_to_its_caller() -> None:
    model, (x, y) = tiny_cnn(0).eval(), images()
    with SimulatedTF32() as gpu:
        pgd(model, x, AttackGoal("ce", y), PGDSpec(0.1, 0.02, 2))
    assert gpu.rounded > 0
    assert AttackSwitches().dtype is None
