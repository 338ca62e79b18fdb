"""Every method trains, resumes exactly, and computes the same captured and compiled."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs, nothing_waits
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.method_variants import TINY, VARIANTS, flags, make_method, teacher  # noqa: F401
from support.networks import tiny_cnn
from torch import Tensor
from torch._dynamo.utils import counters

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.config import OptimConfig, to_flat
from fastdynat.data import Batch
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import METHODS, method_class
from fastdynat.methods.configs import default_config
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep
from fastdynat.tuning.devices import AMP_DTYPES

CPU = torch.device("cpu")
SIZES = (12, 12, 7)  # of an epoch's batches: the last one is short
# Epochs after which both of an epoch's full batches are captured, also where they are of two kinds (nu_at).
CAPTURING = WARM_UP_CALLS + 1
# Where the default attack of the tests does not fit.
SPECS = {name: PGDSpec(0.1, 0.1, 1) for name in ("fgsm_rs", "n_fgsm", "nu_at", "liet")} | {
    name: PGDSpec(0.1, 0.1, 1, start="none") for name in ("fgsm_pgi", "free", "grad_align")
}


def make_step(
    variant: str,
    *,
    amp: str = "off",
    compile_mode: str = "off",
    awp: float = 0.0,
    device: torch.device = CPU,
    **kwargs: Any,
) -> TrainStep:
    method = make_method(variant)
    model = tiny_cnn(0)
    networks = NetworkSet(
        model,
        tiny_cnn(1) if method.uses_guide else None,
        frozen_guide="guide" not in method.trains,
        image_shape=(3, 8, 8),
        device=device,
        channels_last=amp != "off",
        attack=AttackSwitches(dtype=AMP_DTYPES[amp], channels_last=amp != "off", compile=compile_mode),
        compile_mode=compile_mode,
        fallbacks=NoFallbacks(),
    )
    method.epochs = 4
    method.num_classes, method.num_images = 10, max(SIZES)
    method.buffers = method.make_buffers(torch.zeros(max(SIZES), 3, 8, 8, device=device))
    return TrainStep(
        method,
        networks,
        SPECS.get(method.name, PGDSpec(0.1, 0.05, 3, start="gaussian")),
        OptimConfig(lr=0.05, epochs=4, clip_grad=0.5),
        Precision(amp, device),
        lambda n: 1 / (1 + n),
        awp=WeightPerturbation(model, awp, warmup=1) if awp else None,
        fallbacks=NoFallbacks(),
        **kwargs,
    )


def batches(epoch: int, device: torch.device = CPU, *, mixed: bool = False) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    for size in SIZES:
        x, labels = (
            torch.rand(size, 3, 8, 8, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        rows = torch.rand(size, 10, generator=generator).softmax(1).to(device) if mixed else None
        labels = labels.to(device) if rows is None else rows.argmax(1)
        yield Batch(x.to(device), labels, torch.arange(size, device=device), mixed=rows)


def train(step: TrainStep, epochs: int, *, mixed: bool = False) -> tuple[list[dict[str, float]], Tensor]:
    """Logs of every step; weights, statistics and the method's own tensors at the end."""
    torch.manual_seed(5)
    logs = []
    for epoch in range(epochs):
        step.start_epoch(epoch)
        for batch in batches(epoch, mixed=mixed):
            logs.append({key: float(value) for key, value in step(batch).items()})
    kept = [
        *step.method.buffers.values(),
        *(t for net in step.networks.raw.values() for t in net.state_dict().values()),
    ]
    return logs, torch.cat([t.detach().double().flatten() for t in kept])


def same(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    return repr(a) == repr(b)  # NaN equals NaN


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_step_is_the_plain_step_bit_for_bit(variant: str, amp: str) -> None:
    """The recording refuses whatever waits for the device, so this also says that nothing in a step does."""
    recorder = SimulatedRecorder()
    got, want = (
        train(make_step(variant, amp=amp, recorder=recorder), 4),
        train(make_step(variant, amp=amp), 4),
    )
    assert recorder.captured >= 1
    assert recorder.replayed >= (2 * 4 - WARM_UP_CALLS) - 3 * recorder.captured
    assert same(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert bool(got[1].isfinite().all())
    assert all(("train_adv_acc" in row) == method_class(VARIANTS[variant][0]).logs_adv_acc for row in got[0])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if make_method(v).smooths_labels])
def test_smoothed_and_mixed_labels_in_a_captured_step(variant: str) -> None:
    recorder, mixed = SimulatedRecorder(), make_method(variant).takes_mixed_labels
    steps = [make_step(variant, recorder=recorder), make_step(variant)]
    for step in steps:
        step.method.label_smoothing = 0.2
    got, want = (train(step, CAPTURING, mixed=mixed) for step in steps)
    assert recorder.replayed > 0
    assert same(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert bool(got[1].isfinite().all())
    plain = train(make_step(variant), CAPTURING, mixed=mixed)
    assert not torch.equal(got[1], plain[1])


@pytest.mark.parametrize("variant", [v for v, (name, _) in VARIANTS.items() if method_class(name).searches])
def test_weight_perturbation_in_a_captured_step(variant: str) -> None:
    """Off in the first epoch, on from the second: another graph."""
    recorder = SimulatedRecorder()
    steps = [
        make_step(variant, awp=0.05, recorder=recorder),
        make_step(variant, awp=0.05),
        make_step(variant),
    ]
    captured, plain, without = (train(step, 1 + CAPTURING)[1] for step in steps)
    assert recorder.captured >= 1
    assert torch.equal(captured, plain)
    assert not torch.equal(plain, without)


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_gpu(variant: str, amp: str) -> None:
    device = torch.device("cuda")
    step, given = make_step(variant, amp=amp, device=device), list(batches(0, device))
    step(given[0])  # cuDNN's choices and first allocations may wait
    with nothing_waits():
        for batch in given:
            step(batch)


@needs("cxx")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow])])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_without_breaks_once_and_with_eagers_numbers(
    variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods can break tracing and differentiation; compiling all of them by Inductor takes minutes."""
    if backend != "inductor":
        whole = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda fn, options, **kwargs: whole(fn, backend=backend, **kwargs)
        )
    compiled = make_step(variant, compile_mode="default")
    counters.clear()
    got = train(compiled, 1)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    train(compiled, 1)
    assert counters["stats"]["unique_graphs"] == 0, "recompiled after the first epoch"
    want = train(make_step(variant), 1)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_resumes_exactly_and_evaluates(variant: str, teacher: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = flags(variant, teacher)
    assert main(["train", "--run-dir", str(whole), *TINY, *given]) == 0
    assert main(["train", "--run-dir", str(parts), *TINY, *given, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    states = [torch.load(run / "last" / "state.pt", weights_only=True) for run in (whole, parts)]
    assert torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])
    for name in (p.name for p in (whole / "last").glob("*.safetensors")):
        assert (whole / "last" / name).read_bytes() == (parts / "last" / name).read_bytes()
    for name, tensor in states[0]["method"].items():
        assert torch.equal(tensor, states[1]["method"][name])
    attacks = ["--attacks", "clean,pgd2", "--num-images", "20", "--checkpoints", "last"]
    assert main(["eval", str(parts), *attacks, "--json", str(tmp_path / "eval.json")]) == 0


def test_no_option_of_a_method_hides_a_shared_flag() -> None:
    natural = METHODS["natural"].options_type
    shared = set(to_flat(default_config("natural"))) - {f.name for f in dataclasses.fields(natural)}
    for name, method in METHODS.items():
        assert not shared & {f.name for f in dataclasses.fields(method.options_type)}, name
