"""Activation checkpointing: the plain step's gradients, statistics and random numbers, and less memory."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.same_run import assert_same_run
from support.twenty_networks import table_network
from support.world_training import trained
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.methods import Dynat, DynatOptions, Method, Trades, TradesOptions
from fastdynat.models import build_model
from fastdynat.training.activation_checkpointing import blocks_of
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

CPU = torch.device("cpu")
VARIANTS = {
    "trades": {},
    "dynat": {},
    "madry": {"awp": 0.01, "accumulate": 2},
    "lbgat": {"awp": 0.01},
    "free": {},
    "fgsm_pgi": {"label_smoothing": 0.4},
    "hat": {"attack_bn": "train"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_plain_ones_bit_for_bit(variant: str) -> None:
    """Running statistics too, which the second pass through a block would move again."""
    options = {"norm": "batch", **VARIANTS[variant]}
    plain, logs = trained(variant, options)
    found, found_logs = trained(variant, {**options, "checkpointing": True})
    assert torch.equal(found, plain)
    assert found_logs == logs


def test_two_processes_are_theirs(ranks: Callable[[int], Any]) -> None:
    """With synchronised batch norm, whose second pass communicates again."""
    for options in ({"norm": "batch"}, {"norm": "batch", "awp": 0.01, "accumulate": 2}):
        plain = ranks(2)(trained, "trades", options)
        found = ranks(2)(trained, "trades", {**options, "checkpointing": True})
        for (weights, logs), (expected, expected_logs) in zip(found, plain, strict=True):
            assert torch.equal(weights, expected)
            assert logs == expected_logs


def step_of(
    network: Callable[[], nn.Module],
    method: Method[Any],
    size: int,
    *,
    checkpointing: bool,
    amp: str = "off",
    compile_mode: str = "off",
    recorder: Any = None,
) -> TrainStep:
    networks = NetworkSet(
        network(),
        network() if method.uses_guide else None,
        image_shape=(3, size, size),
        device=CPU,
        compile_mode=compile_mode,
        checkpointing=checkpointing,
        fallbacks=NoFallbacks(),
    )
    spec, optim = PGDSpec(0.1, 0.05, 1, start="none"), OptimConfig(lr=0.1, epochs=1)
    return TrainStep(
        method, networks, spec, optim, Precision(amp, CPU), lambda n: 1.0, recorder=recorder, seed=1
    )


def weights_after(step: TrainStep, size: int, steps: int = 2) -> list[Tensor]:
    torch.manual_seed(3)
    for _ in range(steps):
        step(Batch(torch.rand(4, 3, size, size), torch.arange(4), torch.arange(4)))
    return [t.clone() for network in step.networks.raw.values() for t in network.state_dict().values()]


def wide() -> nn.Module:
    torch.manual_seed(0)
    return build_model("wrn-16-1", num_classes=10, image_shape=(3, 8, 8))


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", [Trades(TradesOptions()), Dynat(DynatOptions())], ids=["trades", "dynat"])
def test_a_residual_network_is_the_plain_one(method: Method[Any], amp: str) -> None:
    plain, found = (
        weights_after(step_of(wide, method, 8, checkpointing=on, amp=amp), 8) for on in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchvision:efficientnet_b0", id="random depth and dropout"),
        pytest.param("timm:vit_tiny_patch16_224", marks=needs("timm"), id="vit"),
        pytest.param("timm:convnext_atto", marks=needs("timm"), id="convnext"),
    ],
)
def test_networks_that_draw_random_numbers_draw_the_same_again(name: str) -> None:
    plain, found = (
        weights_after(
            step_of(lambda: table_network(name), Trades(TradesOptions()), 32, checkpointing=on), 32, 1
        )
        for on in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_captured_steps_are_the_plain_ones() -> None:
    def after(on: bool) -> list[Tensor]:
        recorder = SimulatedRecorder()
        return weights_after(
            step_of(wide, Trades(TradesOptions()), 8, checkpointing=on, recorder=recorder), 8
        )

    assert all(torch.equal(one, other) for one, other in zip(after(True), after(False), strict=True))


def test_a_compiled_pass_has_the_plain_gradients_and_moves_statistics_once() -> None:
    found = []
    for on, mode in ((False, "off"), (True, "default")):
        networks = step_of(wide, Trades(TradesOptions()), 8, checkpointing=on, compile_mode=mode).networks
        x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        networks.views.model(x).square().sum().backward()
        found.append(networks.raw["model"])
    plain, compiled = found
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).abs().max()) < 1e-3 * float(other.grad.abs().max())
    for one, other in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on", [False, True])
def test_activations_of_a_block_are_gone_after_its_forward_pass(on: bool) -> None:
    step = step_of(wide, Trades(TradesOptions()), 8, checkpointing=on)
    network = step.networks.passes["model"]
    held: list[weakref.ref[Tensor]] = []
    layer = network.get_submodule("net.block2.layer.0.conv1")
    layer.register_forward_hook(lambda module, args, out: held.append(weakref.ref(out)))
    loss = network(torch.rand(4, 3, 8, 8)).sum()
    assert (held[0]() is None) == on
    loss.backward()
    assert len(held) == 1 + on


def test_the_blocks_of_networks() -> None:
    """Six residual blocks of WRN-16; timm's and torchvision's blocks, not their stages or layers."""
    assert [type(block).__name__ for block in blocks_of(wide())] == ["WideBlock"] * 6
    names = [type(block).__name__ for block in blocks_of(table_network("torchvision:swin_t"))]
    assert names.count("SwinTransformerBlock") == 12
    names = [type(block).__name__ for block in blocks_of(table_network("torchvision:squeezenet1_1"))]
    assert names == ["Fire"] * 8


@needs("timm")
def test_the_blocks_of_timms_networks() -> None:
    for name, kind, number in (
        ("timm:vit_tiny_patch16_224", "Block", 12),
        ("timm:convnext_atto", "ConvNeXtBlock", 12),
        ("timm:resnet18", "BasicBlock", 8),
    ):
        names = [type(block).__name__ for block in blocks_of(table_network(name))]
        assert names.count(kind) == number, names


def test_a_network_without_blocks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--model", "small", "--grad-checkpointing", "--run-dir", str(run)]) == 2
    assert "SmallNet has no blocks to recompute" in capsys.readouterr().err
    assert not run.exists()


def test_a_run_is_resumed_with_it(tmp_path: Path) -> None:
    flags = ["--model", "wrn-10-1", "--train-size", "60", "--val-size", "20", "--batch-size", "30", "--quiet"]
    flags += ["--steps", "1", "--epochs", "2", "--method", "madry"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *flags, "--run-dir", str(whole)]) == 0
    assert main(["train", *flags, "--run-dir", str(parts), "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--grad-checkpointing", "--quiet"]) == 0
    assert_same_run(whole, parts)
