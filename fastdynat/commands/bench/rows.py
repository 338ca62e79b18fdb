"""The rows of a benchmark: planned, prepared, checked, and timed in turns."""

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fastdynat.commands.bench import work
from fastdynat.commands.bench.bench_config import BenchConfig
from fastdynat.commands.bench.settings import (
    SWITCHES,
    Kind,
    Switch,
    grid,
    label,
    precision_name,
    switch_values,
    why_not_turned,
)
from fastdynat.commands.bench.stopwatch import Samples, Stopwatch, take_turns
from fastdynat.commands.bench.work import Work
from fastdynat.config import TrainConfig
from fastdynat.data import TrainSplit
from fastdynat.evaluation.fidelity import Fidelity
from fastdynat.execution.float32 import tf32_convolutions
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.machine.peak_memory import PeakMemory
from fastdynat.methods import method_class
from fastdynat.terminal.messages import MessageCollector
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.tuning.devices import AMP_DTYPES

# Calls after the first, cold one that prepare something: the second repeats the checks of compiled code, a
# later one captures the graph and checks it.
PREPARING_CALLS = {"cuda": WARM_UP_CALLS + 1, "cpu": 1}
FIRST_SAMPLE_CALLS = {"cuda": 16, "cpu": 1}  # after those: the rate until all rows take turns
WEIGHT_GRADIENTS = "weight gradients"


@dataclass(frozen=True)
class RowPlan:
    """A row to be prepared.

    Attributes:
        switch: the one that is the other way than asked, "" for none.
        ours: not a peer's: to be checked and to be compared with a baseline.
        flops: needed per call, whatever the row spends.
        why_not: why it is left out, "" where it is not.
    """

    name: str
    kind: Kind
    images: int
    setting: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], Work] | None = None
    switch: str = ""
    ours: bool = True
    flops: int = 0
    amp: str = "off"
    precision: str = "fp32"
    why_not: str = ""


@dataclass
class BenchRow:
    """A plan with what came of it: `invalid` says why its timing does not count, `notices` what the engine
    said about it.
    """

    plan: RowPlan
    work: Work
    first_seconds: float
    peak_memory: int | None
    fidelity: Fidelity | None = None
    invalid: str = ""
    notices: tuple[str, ...] = ()
    samples: Samples = field(default_factory=lambda: Samples(()))

    @property
    def rate(self) -> float:
        """Images (for a matrix product: calls) per second."""
        return self.plan.images / self.samples.median

    @property
    def flops_per_s(self) -> float:
        return self.plan.flops / self.samples.median


@dataclass(frozen=True)
class BenchSetup:
    """The common part of all rows.

    Attributes:
        asked: the configuration as the user wrote it; `full` is that resolved.
        settle: resolves a configuration.
        attack_flops, step_flops: per image.
    """

    asked: TrainConfig[Any]
    full: ResolvedConfig[Any]
    settle: Callable[[TrainConfig[Any]], ResolvedConfig[Any]]
    split: TrainSplit
    attack_flops: int
    step_flops: int


def plans(setup: BenchSetup, bench: BenchConfig) -> list[RowPlan]:
    """Every row, as the tables show them."""
    full = setup.full
    attacks = method_class(full.method).searches
    settings = grid(setup.asked, setup.settle) if bench.peers else [full]
    rows = [_ours(setup, "attack", s) for s in settings if attacks]
    rows += _peer_attacks(setup) if bench.peers and attacks else []
    rows += [
        _ours(setup, "step", s)
        for s in ([settings[0], full] if bench.peers and settings[0] != full else [full])
    ]
    rows += [_plain(setup)] if bench.peers else []
    if bench.switches:
        rows += _switched(setup, SWITCHES)
    elif full.engine.grad_checkpointing:  # what it saves is a comparison
        rows += _switched(setup, [switch for switch in SWITCHES if switch.name == "grad_checkpointing"])
    devices = dict.fromkeys(row.amp for row in rows if not row.why_not)
    return rows + [_matmul(amp, torch.device(full.engine.device)) for amp in devices]


def _ours(
    setup: BenchSetup, kind: Kind, config: ResolvedConfig[Any], name: str = "", switch: str = ""
) -> RowPlan:
    build = work.engine_attack if kind == "attack" else work.engine_step
    per_image = setup.attack_flops if kind == "attack" else setup.step_flops
    return RowPlan(
        name or label(config),
        kind,
        config.data.batch_size,
        switch_values(config),
        partial(build, config, setup.split),
        switch,
        flops=per_image * config.data.batch_size,
        amp=config.engine.amp,
        precision=precision_name(config),
    )


def _peer_attacks(setup: BenchSetup) -> list[RowPlan]:
    reason = (
        "" if importlib.util.find_spec("torchattacks") else "not installed: pip install 'fastdynat[peer]'"
    )
    if setup.full.attack.attack != "pgd" or setup.full.attack.norm not in ("linf", "l2"):
        reason = "torchattacks has this attack under linf and l2 only as PGD"
    plain = replace(setup.asked.engine, amp="off", compile="off", channels_last="off", graphs="off")
    settings = [plain]
    if setup.full.engine.amp != "off":
        settings.append(replace(plain, amp=setup.full.engine.amp, channels_last="on"))
    rows = []
    for engine in settings:
        config = setup.settle(replace(setup.asked, engine=engine))
        name = "torchattacks.PGD" + (
            _rounding(config) if engine.amp == "off" else f" under {engine.amp} autocast"
        )
        ours = _ours(setup, "attack", config, name)
        prepare = partial(work.torchattacks_attack, config, setup.split)
        rows.append(replace(ours, setting={"amp": engine.amp}, prepare=prepare, ours=False, why_not=reason))
    return rows


def _rounding(config: TrainConfig[Any]) -> str:
    """The suffix of a float32 row whose convolutions use TF32, torch's default on a GPU."""
    name = precision_name(config)
    return "" if name == "fp32" else f", {name}"


def _plain(setup: BenchSetup) -> RowPlan:
    plain = replace(setup.asked.engine, amp="off", compile="off", channels_last="off", graphs="off")
    config = setup.settle(replace(setup.asked, engine=plain))
    reason = (
        ""
        if (config.method, config.attack.norm, config.attack.attack) == ("dynat", "linf", "pgd")
        else "written for DYNAT with PGD under linf"
    )
    ours = _ours(setup, "step", config, "released loop in plain PyTorch" + _rounding(config))
    prepare = partial(work.plain_step, config, setup.split)
    return replace(ours, setting={"amp": "off"}, prepare=prepare, ours=False, why_not=reason)


def _switched(setup: BenchSetup, switches: Sequence[Switch] = SWITCHES) -> list[RowPlan]:
    rows = []
    for switch in switches:
        reason = why_not_turned(switch, setup.full, setup.split.info)
        turned = setup.full if reason else setup.settle(switch.turned(setup.full))
        flag = switch.name.replace("_", "-")
        name = flag if reason else f"{flag} {_word(switch.value(turned))}"
        for kind in switch.kinds:
            if kind == "attack" and not method_class(setup.full.method).searches:
                continue
            rows.append(replace(_ours(setup, kind, turned, name, switch=switch.name), why_not=reason or ""))
    if method_class(setup.full.method).searches and switches is SWITCHES:
        row = _ours(setup, "attack", setup.full, f"with {WEIGHT_GRADIENTS}", switch=WEIGHT_GRADIENTS)
        rows.append(replace(row, prepare=partial(work.weight_gradient_attack, setup.full, setup.split)))
    return sorted(rows, key=lambda row: row.kind)  # attacks first


def _word(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _matmul(amp: str, device: torch.device) -> RowPlan:
    dtype = AMP_DTYPES[amp] or torch.float32
    ready, flops = work.matrix_product(dtype, device)
    precision = amp if amp != "off" else "fp32 (TF32)" if tf32_convolutions(device) else "fp32"
    name = f"matrix product, {precision}"
    return RowPlan(
        name, "matmul", 1, {"amp": amp}, lambda: ready, ours=False, flops=flops, amp=amp, precision=precision
    )


def prepare_rows(
    row_plans: Sequence[RowPlan],
    watch: Stopwatch,
    device: torch.device,
    bench: BenchConfig,
    display: ProgressDisplay,
    keep: Callable[[list[BenchRow]], None] = lambda rows: None,
) -> list[BenchRow]:
    """Build, call for the first time, check and warm up every plan that can be; the others are not in the
    result.

    keep: called after every row with those so far, timed by one sample alone, in the order of `row_plans`.
    """
    place = {id(plan): i for i, plan in enumerate(row_plans)}
    rows: list[BenchRow] = []
    begin = time.perf_counter()
    for plan in by_weight(row_plans):
        if plan.why_not or plan.prepare is None:
            continue
        if bench.budget is not None and time.perf_counter() - begin > bench.budget and plan.kind != "matmul":
            continue
        rows.append(_prepared(plan, plan.prepare, watch, device, display))
        rows.sort(key=lambda row: place[id(row.plan)])
        keep(rows)
    return rows


def _prepared(
    plan: RowPlan, build: Callable[[], Work], watch: Stopwatch, device: torch.device, display: ProgressDisplay
) -> BenchRow:
    display.line(f"preparing: {plan.kind}, {plan.name}")
    memory = PeakMemory(device)
    with MessageCollector() as heard:  # a row that fell back to something slower must show it
        ready = build()
        started = time.perf_counter()
        watch.time(ready.call)
        row = BenchRow(plan, ready, time.perf_counter() - started, None)
        for _ in range(PREPARING_CALLS[device.type]):
            ready.call()
        row.samples = Samples((watch.time(ready.call, FIRST_SAMPLE_CALLS[device.type]),))
    row.peak_memory, row.notices = memory.bytes(), tuple(heard.texts)
    if ready.fidelity is not None:
        row.fidelity = ready.fidelity()
        row.invalid = _weaker(row.fidelity)
    return row


def by_weight(row_plans: Iterable[RowPlan]) -> list[RowPlan]:
    """The order of preparation, most important first, since a budget or an interruption cuts the end off: the
    machine's rate, which every fraction needs; then the setting that was asked for with the peer that it is
    compared with, the step before the attack; then the rest."""

    def weight(plan: RowPlan) -> tuple[int, bool]:
        if plan.kind == "matmul":
            return 0, False
        headline = plan is asked.get(plan.kind) or plan is peers.get(plan.kind)
        return (1 if headline else 2 if not plan.switch else 3), plan.kind != "step"

    plans_ = list(row_plans)
    asked = {plan.kind: plan for plan in plans_ if plan.ours and not plan.switch}  # the last one of each kind
    peers = {plan.kind: plan for plan in reversed(plans_) if not plan.ours}  # the first one, without autocast
    return sorted(plans_, key=weight)


def _weaker(f: Fidelity) -> str:
    """The reason why an attack does not count; "" where it does."""
    if not f.weaker:
        return ""
    reached = (
        f"loss {f.loss_fast:.4g} and accuracy {f.acc_fast:.1%}, the reference "
        f"{f.loss_reference:.4g} and {f.acc_reference:.1%}"
    )
    return f"weaker than the reference: {reached}"


def time_rows(rows: list[BenchRow], watch: Stopwatch, bench: BenchConfig) -> None:
    """Fill in the samples; a row that computed something that is no number is marked invalid."""
    taken = take_turns(watch, [row.work.call for row in rows], seconds=bench.seconds, repeats=bench.repeats)
    for row, samples in zip(rows, taken, strict=True):
        row.samples = samples
        if not row.work.finite():
            row.invalid = "the loss is not a number any more"


def asked_step(rows: Sequence[BenchRow]) -> BenchRow | None:
    """The training step of the setting that was asked for, where it was prepared: the last of ours."""
    return next(
        (row for row in reversed(rows) if row.plan.kind == "step" and row.plan.ours and not row.plan.switch),
        None,
    )


def left_out(row_plans: Iterable[RowPlan], rows: Iterable[BenchRow]) -> list[dict[str, str]]:
    """The plans without a row, each with the reason."""
    done = {id(row.plan) for row in rows}
    return [
        {
            "name": plan.name,
            "kind": plan.kind,
            "switch": plan.switch,
            "reason": plan.why_not or "out of --budget",
        }
        for plan in row_plans
        if id(plan) not in done
    ]
