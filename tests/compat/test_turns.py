"""One attack object on several streams of a GPU, simulated: no turn touches memory that another one uses."""

from typing import Any

import pytest
import torch
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from support.streams import Stream, Watch

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.compat.runner import OnReplica
from fastdynat.compat.turns import Turns
from fastdynat.execution.graphed_call import WARM_UP_CALLS

SPEC = PGDSpec(0.05, 0.02, 2)


def watched(monkeypatch: pytest.MonkeyPatch, recorder: SimulatedRecorder | None) -> Watch:
    """Attacks on changing weights, on one stream and then, without waiting for it, on another one."""
    watch, model = Watch(), tiny_cnn(1).eval().requires_grad_(False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: watch.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    runner: Any = OnReplica(
        model,
        torch.rand(2, 3, 8, 8),
        switches=AttackSwitches(winograd=False),
        fallbacks=NoFallbacks(),
        recorder=recorder,
    )
    runner._turn = Turns(torch.device("cuda"))

    def attack() -> None:
        runner.refresh()
        x = torch.rand(4, 3, 8, 8)
        runner.run(x, AttackGoal("ce", torch.arange(4)), SPEC)

    with watch:
        for stream in (watch.main, watch.side, watch.main):
            with watch.on(stream):
                for _ in range(WARM_UP_CALLS + 2):
                    attack()
    return watch


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "eager"])
def test_turns_on_two_streams_are_ordered(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = SimulatedRecorder() if graphs else None
    watch = watched(monkeypatch, recorder)
    assert watch.races == []
    assert watch.side_work > 30
    assert recorder is None or recorder.replayed > 2 * WARM_UP_CALLS


def test_without_waiting_there_would_be_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    races = watched(monkeypatch, SimulatedRecorder()).races
    assert any("copy_" in race and "writes (4, 3, 8, 8)" in race for race in races), races  # a graph's input
