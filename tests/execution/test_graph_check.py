"""A graph that differs from its step is found before its first use, and the run goes on unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fallbacks import CollectedIn, NoFallbacks
from support.graph_sim import SimulatedRecorder, Tape
from support.graphed_training import make_step
from support.networks import tiny_cnn
from torch import Tensor
from torch.utils._pytree import tree_map

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch
from fastdynat.execution import graph_check
from fastdynat.execution.graph_capture import CaptureFailed
from fastdynat.execution.graphed_call import WARM_UP_CALLS, GraphedCall
from fastdynat.methods import (
    Dynat,
    DynatOptions,
    Free,
    FreeOptions,
    Madry,
    MadryOptions,
    Trades,
    TradesOptions,
)
from fastdynat.methods.burn_in import BurnIn
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.step import TrainStep

Fault = Callable[[Tape], None]


def without(tape: Tape, name: str) -> None:
    kept = [call for call in tape.calls if call[0]._opname != name]
    assert len(kept) < len(tape.calls)
    tape.calls[:] = kept


def stale_input(tape: Tape) -> None:
    """The images that were there at the capture."""
    frozen: dict[int, Tensor] = {}

    def at_capture(value: Any) -> Any:
        if (
            not isinstance(value, Tensor)
            or value.untyped_storage().data_ptr() in tape._own
            or value.shape[1:] != (3, 8, 8)
        ):
            return value
        return frozen.setdefault(id(value), value.clone())

    tape.calls[:] = [
        (func, tree_map(at_capture, args), kwargs, made) for func, args, kwargs, made in tape.calls
    ]
    assert frozen


def missed_statistics(tape: Tape) -> None:
    """One layer's running mean."""
    norms = [
        i
        for i, (func, args, *_) in enumerate(tape.calls)
        if func._opname == "native_batch_norm" and args[3] is not None
    ]
    func, args, kwargs, made = tape.calls[norms[0]]
    tape.calls[norms[0]] = (func, (*args[:3], args[3].clone(), *args[4:]), kwargs, made)


def same_noise(tape: Tape) -> None:
    """The random numbers of the capture, at every replay."""
    drawn = [i for i, call in enumerate(tape.calls) if torch.Tag.nondeterministic_seeded in call[0].tags]
    assert drawn
    for i in drawn:
        made = tape.calls[i][3]
        tape.calls[i] = (torch.ops.aten.clone.default, (made[0].clone(),), {}, made)


def noise_twice(tape: Tape) -> None:
    """The right images, but more numbers used up than the step uses."""
    tape.calls.append((torch.ops.aten.rand.default, ([4],), {}, [torch.rand(4)]))


def skipped_update(tape: Tape) -> None:
    without(tape, "_fused_sgd_")


def frozen_rate(tape: Tape) -> None:
    for i, (func, args, kwargs, made) in enumerate(tape.calls):
        if func._opname == "_fused_sgd_":
            tape.calls[i] = (func, args, {**kwargs, "lr": kwargs["lr"].clone()}, made)


def old_weights(tape: Tape) -> None:
    """The attack's replica does not follow the model."""
    without(tape, "_foreach_copy_")


FAULTS: dict[str, Fault] = {
    f.__name__: f for f in (stale_input, missed_statistics, same_noise, skipped_update, frozen_rate)
}
FAULTS |= {"noise_twice": noise_twice}


def train(step: TrainStep) -> tuple[list[dict[str, float]], Tensor]:
    """Metrics of each step; weights, averages, buffers and optimiser state at the end."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    logs = []
    for _ in range(WARM_UP_CALLS + 3):
        x, labels = torch.rand(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)
        logs.append({key: float(value) for key, value in step(Batch(x, labels, torch.arange(8))).items()})
    tensors = [*step._subject().state().values(), *step.networks.deployed().state_dict().values()]
    return logs, torch.cat([t.detach().double().flatten() for t in tensors])


def dynat(**kwargs: Any) -> TrainStep:
    return make_step(Dynat(DynatOptions()), "cpu", **kwargs)


def madry(**kwargs: Any) -> TrainStep:
    return make_step(Madry(MadryOptions()), "cpu", **kwargs)


def trades_awp(**kwargs: Any) -> TrainStep:
    step = make_step(Trades(TradesOptions()), "cpu", **kwargs)
    step.awp = WeightPerturbation(step.networks.raw["model"], 0.05)
    return step


def free(**kwargs: Any) -> TrainStep:
    method = Free(FreeOptions())
    method.buffers = method.make_buffers(torch.zeros(8, 3, 8, 8))
    return make_step(method, "cpu", **kwargs)


def burn_in(**kwargs: Any) -> TrainStep:
    return make_step(BurnIn(Madry(MadryOptions())), "cpu", **kwargs)


CASES = [(madry, fault) for fault in FAULTS]
CASES += [
    (dynat, "stale_input"),
    (dynat, "same_noise"),
    (trades_awp, "missed_statistics"),
    (trades_awp, "skipped_update"),
]
CASES += [
    (free, "skipped_update"),
    (free, "stale_input"),
    (burn_in, "frozen_rate"),
    (burn_in, "missed_statistics"),
]


@pytest.mark.parametrize(("make", "fault"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_found_and_the_run_is_the_one_without_graphs(
    make: Callable[..., TrainStep], fault: str
) -> None:
    said: list[str] = []
    recorder = SimulatedRecorder(FAULTS[fault])
    got, draws = train(make(recorder=recorder, fallbacks=CollectedIn(said))), torch.get_rng_state()
    want = train(make())
    assert (recorder.captured, recorder.replayed) == (1, 0)
    assert len(said) == 1
    assert said[0].startswith(
        "CUDA graphs are off: a replay differs from the function it was captured from: "
    )
    assert "\n" not in said[0]
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    assert torch.equal(draws, torch.get_rng_state())


def test_what_differs_is_named() -> None:
    said: list[str] = []
    train(madry(recorder=SimulatedRecorder(skipped_update), fallbacks=CollectedIn(said)))
    train(madry(recorder=SimulatedRecorder(noise_twice), fallbacks=CollectedIn(said)))
    train(madry(recorder=SimulatedRecorder(missed_statistics), fallbacks=CollectedIn(said)))
    assert "weight model." in said[0] or "momentum_buffer model." in said[0]
    assert "random numbers are others" in said[1]
    assert "buffer model.1.running_mean differs by 1 of its change" in said[2]


@pytest.mark.parametrize("fault", [old_weights, stale_input, same_noise], ids=lambda f: f.__name__)
def test_the_attack_in_half_precision_beside_a_gradient_scaler(fault: Fault) -> None:
    """With fp16 only the attack is captured; its replica holds copies of the weights."""
    said: list[str] = []
    step = make_step(
        Dynat(DynatOptions()), "cpu", "bf16", SimulatedRecorder(fault), fallbacks=CollectedIn(said)
    )
    got, want = train(step), train(make_step(Dynat(DynatOptions()), "cpu", "bf16"))
    assert len(said) == 1
    assert torch.equal(got[1], want[1])


def attack(recorder: SimulatedRecorder | None, said: list[str], **others: Any) -> Tensor:
    x, y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    model = tiny_cnn()
    engine = AttackEngine(model, x[:2], recorder=recorder, fallbacks=CollectedIn(said), **others)
    torch.manual_seed(0)
    found = []
    for _ in range(WARM_UP_CALLS + 3):
        found.append(engine.run(x, AttackGoal("ce", y), PGDSpec(0.1, 0.03, 3)).x_adv)
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        engine.refresh()
    return torch.cat([*found, *(b.flatten() for b in model.buffers() if b.dim())][: len(found)])


@pytest.mark.parametrize("bn", ["eval", "train"])
@pytest.mark.parametrize("fault", [None, stale_input, same_noise, noise_twice])
def test_a_captured_attack_is_checked_too(fault: Fault | None, bn: str) -> None:
    said: list[str] = []
    got, want = attack(SimulatedRecorder(fault), said, bn=bn), attack(None, [], bn=bn)
    assert torch.equal(got, want)
    assert len(said) == (fault is not None)


def test_weights_that_were_taken_at_the_capture_are_found() -> None:
    """Copies that are the replica's own are moved for the check."""

    def at_capture(tape: Tape) -> None:
        for i, (func, args, kwargs, made) in enumerate(tape.calls):
            if func._opname == "convolution":
                tape.calls[i] = (func, (args[0], args[1].clone(), *args[2:]), kwargs, made)

    said: list[str] = []
    switches = AttackSwitches(dtype=torch.bfloat16)
    got = attack(SimulatedRecorder(at_capture), said, switches=switches)
    assert torch.equal(got, attack(None, [], switches=switches))
    assert len(said) == 1


def rounded(by: float) -> Fault:
    """Another order of additions in the update: momentum that is off by the share `by`."""

    def fault(tape: Tape) -> None:
        for i, (func, args, kwargs, made) in enumerate(tape.calls):
            if func._opname == "_fused_sgd_":
                tape.calls[i] = (func, args, {**kwargs, "momentum": kwargs["momentum"] * (1 + by)}, made)

    return fault


@pytest.mark.parametrize(
    ("by", "deterministic", "off"), [(1e-5, False, False), (1e-5, True, True), (0.5, False, True)]
)
def test_rounding_is_allowed_unless_the_run_is_to_be_deterministic(
    by: float, deterministic: bool, off: bool
) -> None:
    said: list[str] = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        train(madry(recorder=SimulatedRecorder(rounded(by)), fallbacks=CollectedIn(said)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(said) == off


@pytest.mark.parametrize(("noise", "off"), [(0.03, False), (3.0, True)])
def test_a_function_that_does_not_repeat_itself_is_judged_by_its_own_noise(noise: float, off: bool) -> None:
    """Kernels with atomic additions: their noise comes from no generator."""
    private, said = torch.Generator().manual_seed(0), list[str]()

    def fn(x: Tensor) -> Tensor:
        return x + noise * torch.randn(x.shape, generator=private)

    call = GraphedCall(fn, SimulatedRecorder(), CollectedIn(said))
    for _ in range(WARM_UP_CALLS + 2):
        call(torch.rand(5, 7))
    assert len(said) == off


def test_a_check_without_memory_is_said_and_leaves_no_trace() -> None:
    class Full(SimulatedRecorder):
        def warm(self, fn: Callable[[], Any]) -> Any:
            result = super().warm(fn)
            if self.warmed == WARM_UP_CALLS + 1:  # the reference of the check, once it has changed everything
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on")
            return result

    said: list[str] = []
    step = madry(recorder=Full(), fallbacks=CollectedIn(said))
    batch = Batch(torch.rand(8, 3, 8, 8), torch.arange(8), torch.arange(8))
    plain = madry()
    for one in (step, plain):
        torch.manual_seed(0)
        for _ in range(WARM_UP_CALLS + 3):
            one(batch)
    assert said == [
        "CUDA graphs are off: a replay could not be checked: CUDA out of memory. Tried to allocate"
    ]
    for a, b in zip(
        step.networks.raw["model"].state_dict().values(),
        plain.networks.raw["model"].state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_an_interrupted_check_puts_everything_back() -> None:
    class Interrupted(SimulatedRecorder):
        def capture(self, fn: Callable[[], Any]) -> Any:
            raise KeyboardInterrupt

    step = dynat(recorder=Interrupted())
    batch = Batch(torch.rand(8, 3, 8, 8), torch.arange(8), torch.arange(8))
    for _ in range(WARM_UP_CALLS):
        step(batch)
    before = {
        name: tensor.clone()
        for name, tensor in step._subject().state().items()
        if not name.startswith("rate")
    }
    draws = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        step(batch)
    after = step._subject().state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(draws, torch.get_rng_state())


def test_a_check_waits_where_the_caller_forbids_it_and_the_mode_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes, waited = [2], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch._C, "_cuda_set_sync_debug_mode", modes.append)
    on_host = graph_check.on_host

    def copy(tensors: Any) -> Any:
        waited.append(modes[-1])
        return on_host(tensors)

    monkeypatch.setattr(graph_check, "on_host", copy)
    said: list[str] = []
    call = GraphedCall(lambda x: 2 * x, SimulatedRecorder(), CollectedIn(said))
    for _ in range(WARM_UP_CALLS + 2):
        call(torch.rand(5, 7))
        assert modes[-1] == 2
    assert waited
    assert set(waited) == {0}
    assert not said


def test_other_batches_than_the_one_at_hand_are_compared_in_its_layout() -> None:
    seen: list[Tensor] = []

    def fn(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1).sum(1) + labels

    call = GraphedCall(fn, SimulatedRecorder(), NoFallbacks())
    x = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for _ in range(WARM_UP_CALLS + 1):
        call(x, torch.arange(4))
    checked = seen[WARM_UP_CALLS]
    assert checked.stride() == x.stride()
    assert not torch.equal(checked, x)
    assert torch.equal(checked.flatten().sort().values, x.flatten().sort().values), (
        "images in the range of images"
    )


def test_a_capture_that_failed_elsewhere_is_given_up_here_too() -> None:
    """Replays hold collectives: on some of the processes only they would wait for the others for ever."""
    said: list[str] = []
    recorder = SimulatedRecorder()
    told: list[bool] = []

    def on_all(captured: bool) -> bool:
        told.append(captured)
        return False

    call = GraphedCall(lambda x: 2 * x, recorder, CollectedIn(said), on_all=on_all)
    x = torch.rand(3)
    for _ in range(WARM_UP_CALLS + 2):
        assert torch.equal(call(x), 2 * x)
    assert (told, call.failed) == ([True], True)
    assert recorder.replayed < 0  # the recorder leaves out the replay of the check, which did not come
    assert said == ["CUDA graphs are off: the capture failed in another process"]


def test_a_failed_capture_is_told_to_the_others() -> None:
    class Failing(SimulatedRecorder):
        def capture(self, fn: Callable[[], Any]) -> Any:
            raise CaptureFailed("no memory")

    told: list[bool] = []
    call = GraphedCall(
        lambda x: 2 * x, Failing(), CollectedIn([]), on_all=lambda captured: told.append(captured) or captured
    )
    for _ in range(WARM_UP_CALLS + 1):
        call(torch.rand(3))
    assert told == [False]


@pytest.mark.parametrize(
    ("answers", "runs", "off"),
    [
        ([True, True, True], 0, None),
        ([True, False, True], 1, None),
        ([True, True, False], 0, "in another process a replay differs from the function"),
        ([True, False, False], 1, "in another process a replay differs from the function"),
    ],
)
def test_processes_check_a_replay_equally_often_and_decide_together(
    answers: list[bool], runs: int, off: str | None
) -> None:
    """The function holds collectives: one more run of it in one process would meet another step of others."""
    said, asked, calls = list[str](), list[bool](), list[Tensor]()

    def on_all(well: bool) -> bool:
        asked.append(well)
        return answers[len(asked) - 1]

    def fn(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    call = GraphedCall(fn, SimulatedRecorder(), CollectedIn(said), on_all=on_all)
    for _ in range(WARM_UP_CALLS + 1):
        assert torch.equal(call(torch.arange(3.0)), 2 * torch.arange(3.0))
    once = 2 + (off is not None)  # the reference and the capture; the call itself, without a graph
    assert (asked, len(calls)) == ([True] * 3, WARM_UP_CALLS + once + runs)
    assert [text.partition("CUDA graphs are off: ")[2].partition(" it was")[0] for text in said] == (
        [] if off is None else [off]
    )


def test_what_a_check_finds_here_is_told_to_the_others() -> None:
    private, asked = torch.Generator().manual_seed(0), list[bool]()

    def noisy(x: Tensor) -> Tensor:
        return x + 3 * torch.randn(x.shape, generator=private)

    call = GraphedCall(
        noisy,
        SimulatedRecorder(),
        CollectedIn([]),
        on_all=lambda well: asked.append(well) or well,
    )
    for _ in range(WARM_UP_CALLS + 1):
        call(torch.rand(5, 7))
    assert asked == [True, False, False]


def test_a_run_that_fails_while_other_processes_wait_in_it_is_an_error() -> None:
    """They wait in its collectives: going on without graphs here would answer them with another step."""

    class Full(SimulatedRecorder):
        full_at = WARM_UP_CALLS + 1

        def warm(self, fn: Callable[[], Any]) -> Any:
            result = super().warm(fn)
            if self.warmed == self.full_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        def capture(self, fn: Callable[[], Any]) -> Any:
            outputs, replay = super().capture(fn)

            def sometimes() -> None:
                if self.replayed == 1:
                    raise RuntimeError("no memory for the launch")
                replay()

            return outputs, sometimes

    step = GraphedCall(lambda x: 2 * x, Full(), NoFallbacks(), on_all=bool)
    for _ in range(WARM_UP_CALLS):
        step(torch.rand(3))
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.rand(3))
    roomy = Full()
    roomy.full_at = 0
    step = GraphedCall(lambda x: 2 * x, roomy, NoFallbacks(), on_all=bool)
    for _ in range(WARM_UP_CALLS + 1):
        step(torch.rand(3))
    with pytest.raises(RuntimeError, match="no memory for the launch"):
        step(torch.rand(3))


def test_released_graphs_are_captured_anew() -> None:
    recorder = SimulatedRecorder()
    call = GraphedCall(lambda x: 2 * x, recorder, CollectedIn([]))
    x = torch.rand(3)
    for _ in range(WARM_UP_CALLS + 2):
        call(x)
    call.release()
    for _ in range(WARM_UP_CALLS + 2):
        assert torch.equal(call(x), 2 * x)
    assert recorder.captured == 2
