"""`--zero1`: sharded momentum gives the update and the checkpoints of momentum that is whole."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdynat.commands.main import main
from fastdynat.config import EngineConfig, OptimConfig
from fastdynat.config.optimizer_kinds import OPTIMIZER_KINDS
from fastdynat.distributed import world
from fastdynat.errors import UserError
from fastdynat.training import parts
from fastdynat.training.optimizers import (
    build_optimizers,
    load_optimizer_state,
    local_part,
    optimizer_state,
)
from fastdynat.training.resolve_engine import check_switches

CASES = {
    "separate": {},
    "joint": {"optimizers": "joint", "nesterov": True},
    "norms without decay": {"decay_norms": False},
    "cycled momentum": {"cycled": True},
    "no momentum": {"momentum": 0.0},
    "adamw": {"opt": "adamw", "optimizers": "joint"},
    "lion": {"opt": "lion"},
}


class Pair:
    """Two networks and their optimisers, sharded or whole, from the same weights."""

    def __init__(self, case: dict[str, Any], *, zero1: bool) -> None:
        torch.manual_seed(3)
        options = {key: value for key, value in case.items() if key != "cycled"}
        self.config: Any = OptimConfig(epochs=1, lr=0.1, weight_decay=1e-3, zero1=zero1, **options)
        self.lr, self.momentum = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        self.cycled = case.get("cycled", False)
        nets = {"model": tiny_cnn(), "guide": tiny_cnn()}
        self.nets = {name: net.double().to(memory_format=torch.channels_last) for name, net in nets.items()}
        self.optimizers = build_optimizers(self.nets, self.config, self.lr, cycled=self.cycled)

    def update(self, number: int) -> None:
        """An update with the same gradients on every rank, as their sum leaves them."""
        self.lr.fill_(0.1 / (1 + number))
        self.momentum.fill_(0.9 - 0.05 * number)
        generator = torch.Generator().manual_seed(number)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.lr
            if self.cycled:
                group["momentum"] = self.momentum
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for optimizer in self.optimizers:
            optimizer.step()

    def parameters(self) -> list[nn.Parameter]:
        return [p for net in self.nets.values() for p in net.parameters()]

    def states(self) -> list[dict[str, Any]]:
        return copy.deepcopy([optimizer_state(optimizer) for optimizer in self.optimizers])


def _same_weights(name: str) -> tuple[bool, int, int]:
    sharded, whole = (Pair(CASES[name], zero1=zero1) for zero1 in (True, False))
    for number in range(5):
        sharded.update(number)
        whole.update(number)
    equal = [torch.equal(a, b) for a, b in zip(sharded.parameters(), whole.parameters(), strict=True)]
    numbers = sum(map(_momentum, sharded.optimizers)), sum(map(_momentum, whole.optimizers))
    return all(equal), *numbers


def _momentum(optimizer: Optimizer) -> int:
    """Numbers of momentum that this process holds."""
    kept = [
        value for state in (optimizer.state, local_part(optimizer).state) for value in state.values() if value
    ]
    tensors: dict[int, Tensor] = {id(t): t for k in kept for t in k.values() if isinstance(t, Tensor)}
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_sharded_momentum_update_as_one_with_all(
    name: str, ranks: Callable[[int], Any]
) -> None:
    found = ranks(2)(_same_weights, name)
    assert all(equal for equal, _, _ in found)
    whole = found[0][2]
    assert sum(part for _, part, _ in found) == whole
    assert (whole == 0) == (name == "no momentum")
    assert all(part < whole for _, part, _ in found) or whole == 0


def _restored(case: dict[str, Any]) -> list[bool]:
    """From whole to sharded and back, with an update after each, beside a run that is never restored."""
    whole, steady = (Pair(case, zero1=False) for _ in range(2))
    for pair in (whole, steady):
        pair.update(0)
    sharded, back = Pair(case, zero1=True), Pair(case, zero1=False)
    for number, (source, target) in enumerate([(whole, sharded), (sharded, back)], start=1):
        states = world().from_first(source.states())
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.data.copy_(theirs.data)
        for optimizer, state in zip(target.optimizers, states, strict=True):
            load_optimizer_state(optimizer, state)
        target.update(number)
        steady.update(number)
    same = zip(back.parameters(), steady.parameters(), strict=True)
    held = [_momentum(optimizer) for optimizer in sharded.optimizers]
    everything = [_momentum(optimizer) for optimizer in steady.optimizers]
    return [*(torch.equal(a, b) for a, b in same), sum(held) < sum(everything)]


@pytest.mark.parametrize("opt", OPTIMIZER_KINDS)
def test_checkpoints_do_not_depend_on_the_sharding(opt: str, ranks: Callable[[int], Any]) -> None:
    for found in ranks(2)(_restored, {"decay_norms": False, "opt": opt}):
        assert all(found)


def test_speed_of_the_boundary_needs_all_momentum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--train-size", "64", "--val-size", "20", "--batch-size", "32", "--steps", "1", "--epochs", "1"]
    run = ["train", "--method", "madry", "--run-dir", str(tmp_path / "run"), "--device", "cpu", *tiny]
    assert main([*run, "--zero1", "--boundary-speed", "4"]) == 2
    assert "--boundary-speed needs the momentum of every weight" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("graphs", ["on", "auto"])
def test_graphs_are_left_out_or_refused(graphs: Any) -> None:
    """As on a machine with a GPU."""
    optim: Any = OptimConfig(epochs=1, lr=0.1, zero1=True)
    attack: Any = SimpleNamespace(norm="linf", attack_bn="eval")
    method: Any = SimpleNamespace(uses_guide=False, name="madry")
    engine = EngineConfig(graphs=graphs)
    if graphs == "on":
        with pytest.raises(UserError, match="the update of --zero1 cannot be captured"):
            check_switches(engine, attack, optim, method, torch.device("cuda"))
    else:
        check_switches(engine, attack, optim, method, torch.device("cuda"))
        config: Any = SimpleNamespace(engine=SimpleNamespace(uses_graphs=True, amp="off"), optim=optim)
        assert parts._recorder(config) is None


def test_alone_it_changes_nothing() -> None:
    sharded, whole = (Pair({}, zero1=zero1) for zero1 in (True, False))
    for pair in (sharded, whole):
        pair.update(0)
    assert [type(optimizer) for optimizer in sharded.optimizers] == [type(o) for o in whole.optimizers]
    for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
