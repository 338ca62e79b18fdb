"""`fastdynat bench --auto`: every automatic decision, timed beside its alternatives."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from fastdynat.commands.bench.results import machine, setting_values
from fastdynat.commands.bench.settings import switch_values
from fastdynat.commands.bench.stopwatch import Samples, rounds
from fastdynat.commands.bench.work import engine_step
from fastdynat.config import EngineConfig, TrainConfig
from fastdynat.data import TrainSplit
from fastdynat.errors import UserError
from fastdynat.execution.fallbacks import SilentFallbacks
from fastdynat.machine import OtherLoad
from fastdynat.machine.capability import processor
from fastdynat.machine.racing import quiet_clock
from fastdynat.runs import source_commit
from fastdynat.terminal.consoles import AS_IS, PlainTable
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.tuning import choice_table

FORMAT = "fastdynat-auto/1"
LEAST = 0.97  # of the best alternative's rate, which a decision must reach
HOPELESS = 2.0  # a setting this many times slower than the best is timed once
SWITCHES = ("amp", "compile", "channels_last", "winograd", "fold")

Settle = Callable[[TrainConfig[Any]], ResolvedConfig[Any]]


@dataclass
class StepSetting:
    """A resolved configuration of the training step with its time.

    Attributes:
        seconds: of each round; a single one where the setting was hopeless.
    """

    config: ResolvedConfig[Any]
    call: Callable[[], object] | None = None
    once: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        e = self.config.engine
        words = [
            "float32" if e.amp == "off" else e.amp,
            "channels-last" if e.channels_last == "on" else "contiguous",
        ]
        words += ["compiled"] * (e.compile != "off")
        words += ["Winograd off"] * (e.amp == "off" and e.winograd == "off") + ["fold off"] * (
            e.fold == "off"
        )
        return ", ".join(words)

    @property
    def rate(self) -> float:
        """Images per second, by the median round."""
        return self.config.data.batch_size / Samples(tuple(self.seconds)).median


@dataclass(frozen=True)
class Decision:
    """The setting chosen for the flags `flags`, and the alternatives it is compared with."""

    flags: str
    chosen: StepSetting
    others: tuple[StepSetting, ...]

    @property
    def best(self) -> StepSetting:
        return max((self.chosen, *self.others), key=lambda setting: setting.rate)

    @property
    def ratio(self) -> float:
        """The chosen one's rate over that of the best."""
        return self.chosen.rate / self.best.rate

    def values(self) -> dict[str, Any]:
        return {
            "flags": self.flags,
            "chosen": self.chosen.name,
            "best": self.best.name,
            "ratio": round(self.ratio, 4),
            "others": {other.name: round(self.chosen.rate / other.rate, 3) for other in self.others},
        }


class _Settings:
    """Each configuration once, however many decisions name it."""

    def __init__(self, asked: TrainConfig[Any], settle: Settle) -> None:
        self._asked, self._settle = asked, settle
        self.all: list[StepSetting] = []

    def typed(self, **engine: Any) -> StepSetting:
        """The setting for these engine flags, with all others left out."""
        blank = EngineConfig()
        left = {name: getattr(blank, name) for name in SWITCHES} | engine
        return self._put(self._settle(replace(self._asked, engine=replace(self._asked.engine, **left))))

    def turned(self, base: StepSetting, **engine: Any) -> StepSetting:
        return self._put(self._settle(replace(base.config, engine=replace(base.config.engine, **engine))))

    def _put(self, config: ResolvedConfig[Any]) -> StepSetting:
        if config.engine.winograd == "on":  # which "auto" is as well, where it is not resolved to "off"
            config = replace(config, engine=replace(config.engine, winograd="auto"))
        found = next((s for s in self.all if s.config.engine == config.engine), None)
        if found is None:
            found = StepSetting(config)
            self.all.append(found)
        return found


def decisions(
    asked: TrainConfig[Any], settle: Settle, half: str = "bf16"
) -> tuple[list[StepSetting], list[Decision]]:
    """All settings to be timed, those that need no compiler first, and what is decided between them."""
    known = _Settings(asked, settle)
    plain = known.typed(amp="off", compile="off")
    fast = known.typed(amp="auto", compile="off")
    combinations = [
        known.typed(amp=amp, compile=mode) for mode in ("off", "default") for amp in ("off", half)
    ]
    found = [
        Decision("--amp --compile", known.typed(amp="auto", compile="auto"), tuple(combinations)),
        Decision("--amp", fast, tuple(s for s in combinations if s.config.engine.compile == "off")),
        Decision("--compile", known.typed(amp="off", compile="auto"), tuple(combinations[::2])),
    ]
    for flags, base in {"(none)": plain, "--amp": fast}.items():
        for name in ("channels_last", "winograd", "fold"):
            e = base.config.engine
            if name == "winograd" and e.amp != "off":
                continue
            value = {"off": "on"}.get(getattr(e, name), "off")
            other = known.turned(base, **{name: value})
            if other is not base:
                found.append(Decision(f"{flags}: {name.replace('_', '-')}", base, (other,)))
    return known.all, list({(d.flags, d.chosen.name): d for d in found}.values())


def time_settings(
    all_settings: Sequence[StepSetting],
    split: TrainSplit,
    seconds: float,
    repeats: int | None,
    display: ProgressDisplay,
) -> None:
    """Fill in the times, in rounds in which all settings take turns."""
    clock = quiet_clock()

    def time_once(call: Callable[[], object]) -> float:
        begin = clock()
        call()
        return clock() - begin

    best = float("inf")
    for setting in all_settings:
        display.line(f"preparing: {setting.name}")
        call = engine_step(setting.config, split, SilentFallbacks()).call
        call()
        if setting.config.engine.compile != "off":
            call()  # compiled code is checked once more when the weights have changed
        setting.once = time_once(call)
        best = min(best, setting.once)
        if setting.once <= HOPELESS * best:
            setting.call = call
    running = [s for s in all_settings if s.call is not None and s.once <= HOPELESS * best]
    for setting in all_settings:
        if setting not in running:
            setting.seconds, setting.call = [setting.once], None
    display.line("timing")
    for number in range(rounds([s.once for s in running], seconds=seconds, repeats=repeats)):
        turn = number % len(running)
        for setting in running[turn:] + running[:turn]:
            assert setting.call is not None
            setting.seconds.append(time_once(setting.call))


def run_auto(
    asked: TrainConfig[Any],
    split: TrainSplit,
    settle: Settle,
    seconds: float,
    repeats: int | None,
    console: Console,
    display: ProgressDisplay,
) -> tuple[dict[str, Any], bool]:
    """Measure and print; the document, and whether every decision reaches `LEAST` of the best.

    Raises:
        UserError: `asked` is for a GPU, where decisions are known.
    """
    device = torch.device(settle(asked).engine.device)
    if device.type != "cpu":
        raise UserError(
            f"--auto times the automatic choices on the CPU; on {device} they are fixed: use --switches, or "
            "--device cpu"
        )
    load = OtherLoad()
    display.line("choosing settings: timing convolutions and, where torch.compile is open, a compiled step")
    all_settings, found = decisions(asked, settle)
    time_settings(all_settings, split, seconds, repeats, display)
    plain = all_settings[0].config
    doc = {
        "format": FORMAT,
        "command": shlex.join(["fastdynat", *sys.argv[1:]]),
        "commit": source_commit(),
        "environment": machine(),
        "processor": processor(device),
        "convolutions": [
            {"setting": name, "seconds": t, "remark": remark} for name, t, remark in choice_table(device)
        ],
        "settings": {key: value for key, value in setting_values(plain).items() if key not in SWITCHES},
        "rows": [_row(setting, all_settings) for setting in all_settings],
        "decisions": [decision.values() for decision in found],
        "other_load": load.share(),
    }
    _print(doc, console)
    return doc, all(decision.ratio >= LEAST for decision in found)


def _row(setting: StepSetting, all_settings: Sequence[StepSetting]) -> dict[str, Any]:
    best = max(s.rate for s in all_settings)
    switches = {name: value for name, value in switch_values(setting.config).items() if name in SWITCHES}
    return {
        "name": setting.name,
        "setting": switches,
        "seconds": Samples(tuple(setting.seconds)).summary(),
        "images_per_s": round(setting.rate, 2),
        "ratio_to_best": round(setting.rate / best, 4),
    }


def _print(doc: Mapping[str, Any], console: Console) -> None:
    s, p = doc["settings"], doc["processor"]
    title = (
        f"{s['method']}: {s['model']}, batch {s['batch_size']}, PGD-{s['steps']}, "
        f"{p['model']}, {p['threads']} thread(s)"
    )
    console.print(f"{title}, {' '.join(p['flags'])}, torch {p['torch']}", **AS_IS)
    rates = PlainTable("training step", "images/s", "of the best", "rounds")
    for row in doc["rows"]:
        rates.add_row(
            row["name"],
            f"{row['images_per_s']:,.1f}",
            f"{row['ratio_to_best']:.2f}",
            str(row["seconds"]["rounds"]),
        )
    console.print(rates)
    decided = PlainTable("flags", "takes", "of the best", "and how many times faster than")
    for d in doc["decisions"]:
        others = "; ".join(
            f"{name} {ratio:.2f}" for name, ratio in d["others"].items() if name != d["chosen"]
        )
        decided.add_row(
            d["flags"], d["chosen"], f"{d['ratio']:.2f}" + ("" if d["ratio"] >= LEAST else " SLOWER"), others
        )
    console.print(decided)
    if doc["other_load"]:
        console.print(f"other processes used {doc['other_load']:.0%} of the CPU meanwhile", **AS_IS)
