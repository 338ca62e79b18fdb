"""A race: laps of one or more records, seed by seed in alternation, each in a new process."""

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdynat.commands.speedrun.lap import Lap, lap_environment
from fastdynat.commands.speedrun.lap_judge import LapJudge
from fastdynat.commands.speedrun.race_log import result_cells
from fastdynat.commands.speedrun.race_results import (
    MACHINE,
    Identity,
    Values,
    finished_laps,
    read_result,
    result_document,
    unchanged,
    write_result,
)
from fastdynat.commands.speedrun.race_rules import CPU_CORES
from fastdynat.commands.speedrun.record_definition import RecordDefinition
from fastdynat.data import Images, ImageSet, load_test
from fastdynat.data.imagefolder import FileSet
from fastdynat.data.read_ahead import pixel_digest
from fastdynat.documents import read_json, through_json
from fastdynat.errors import UserError
from fastdynat.execution.process_state import process_state_kept
from fastdynat.machine.cores import keep_to_own_cores, own_cores
from fastdynat.ops._select import ENVIRONMENT as KERNELS
from fastdynat.runs import lock_folder, package_digest, source_commit
from fastdynat.runs.atomic_files import make_folder, write_text
from fastdynat.terminal.consoles import PlainTable
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.user_code import pin, without_place

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Race:
    """A race as it was asked for; see the flags of `fastdynat speedrun`. `command` repeats it."""

    records: list[RecordDefinition]
    target: float | None
    seeds: int
    data: str
    data_dir: Path
    out: Path
    quick: bool
    command: str


@process_state_kept()
def run_race(race: Race, console: Console, display: ProgressDisplay) -> int:
    """Run what is not finished, evaluate, print and store. Returns 0, or 1 where a record does not count.

    Raises:
        UserError: a machine, data or a record that cannot work, before the first lap; or a lap that failed.
    """
    device = _check_machine(race)
    test = load_test(race.data, race.data_dir, download=race.data == "cifar10")
    make_folder(race.out)
    with lock_folder(race.out) as lock:
        tests = {(race.data, str(race.data_dir), None): test}
        return _Running(race, device, tests, display, lock.fileno()).run(console)


class _Running:
    """The state of a race: the laps that are finished, by record.

    lock: of the race's folder. A lap holds it too: one that outlives the race keeps the next one waiting.
    """

    def __init__(self, race: Race, device: str, tests: Any, display: ProgressDisplay, lock: int) -> None:
        self.race, self.device, self.display, self.lock = race, device, display, lock
        self.names = [record.name for record in race.records]
        keep_to_own_cores()  # as each lap does
        here = lap_environment(device)
        ((_, test),) = tests.values()
        shared: Values = {
            "commit": source_commit(),
            "data": data_title(race.data, test),
            "test": pixel_digest(test),
            "raced": self.names,
            "machine": {key: here[key] for key in MACHINE},
        }
        self.own = {
            record.name: Identity(**shared, code=code_digest(record.train)) for record in race.records
        }
        self.laps = {
            record.name: finished_laps(self.file(record.name), record, self.own[record.name])
            for record in race.records
        }
        self.judge = LapJudge(race.data, str(race.data_dir), device, tests, display)

    def file(self, name: str) -> Path:
        return self.race.out / f"{name}.json"

    def run(self, console: Console) -> int:
        race = self.race
        for seed in range(race.seeds):
            for record in race.records:
                laps = self.laps[record.name]
                before = next((lap for lap in laps if lap["seed"] == seed), None)
                if before is not None and (before["sample"] is not None or race.quick):
                    continue
                self.display.line(f"{record.name}, seed {seed}: {race.out / f'{record.name}-seed{seed}'}")
                done = self._lap(record, seed)
                self.laps[record.name] = sorted(
                    [*(lap for lap in laps if lap is not before), done], key=lambda lap: int(lap["seed"])
                )
                self._store()
        self._store()
        table = PlainTable("record", "seconds", "seeds", "clean %", "PGD-20 %", "AutoAttack %", "counts")
        results = [read_result(self.file(name)) for name in self.names]
        for result in results:
            table.add_row(*result_cells(result))
        console.print(table)
        for result in results:
            for reason in result.reasons:
                logger.warning("%s does not count: %s", result.name, reason)
        return 0 if all(result.counts for result in results) else 1

    def _store(self) -> None:
        """Write the file of each record. What one race measured side by side stands in all of them."""
        race = self.race
        seconds = {name: [lap["seconds"] for lap in laps] for name, laps in self.laps.items()}
        for record in race.records:
            others = {name: times for name, times in seconds.items() if name != record.name}
            document = result_document(
                record,
                self.laps[record.name],
                target=race.target,
                own=self.own[record.name],
                command=race.command,
                alongside=others,
            )
            if self.file(record.name).exists():
                document |= unchanged(read_result(self.file(record.name)), document)
            write_result(self.file(record.name), document)

    def _lap(self, record: RecordDefinition, seed: int) -> Values:
        """Train and evaluate one lap; a training that was finished before is only evaluated."""
        race, name = self.race, f"{record.name}-seed{seed}"
        folder, outcome = race.out / name, race.out / f"{name}.lap.json"
        lap = Lap(
            record=record.name,
            loop=record.loop,
            train=record.train,
            seed=seed,
            data=race.data,
            data_dir=str(race.data_dir),
            device=self.device,
            run_dir=str(folder),
            quiet=self.display.quiet,
        )
        own = self.own[record.name]
        if (now := source_commit()) != own.commit:
            raise UserError(
                f"{name}: the checkout went from commit {own.commit} to {now} during the race; put it back, "
                "and the same command goes on"
            )
        if code_digest(record.train) != own.code:
            raise UserError(
                f"{name}: the code changed during the race (the package, its extension or the record's own "
                "file); put it back, and the same command goes on"
            )
        times = self._kept_times(outcome, lap)
        if times is None:
            outcome.unlink(missing_ok=True)
            times = _timed_in_child(lap, outcome, self.lock)
            write_text(outcome, json.dumps({**times, "of": self._stamp(lap)}) + "\n")
        found = {key: value for key, value in times.items() if key != "of"}
        verdict = self.judge.judge(folder / times["weights"], folder / "evaluations", quick=race.quick)
        return {"seed": seed, "folder": name, **found, **verdict}

    def _kept_times(self, outcome: Path, lap: Lap) -> Values | None:
        """The times of a lap whose training had finished when the race was stopped."""
        if not outcome.exists():
            return None
        values = read_json(outcome, Values, what="the times of a lap", remedy="remove it")
        return values if values.get("of") == self._stamp(lap) else None

    def _stamp(self, lap: Lap) -> Values:
        """Everything that the times of `lap` depend on."""
        asked = {key: value for key, value in asdict(lap).items() if key not in ("quiet", "log_level")}
        stamp: Values = through_json({"lap": asked, **asdict(self.own[lap.record])})
        return stamp


def data_title(data: str, test: Images) -> str:
    """The name of the images: "CIFAR-10", or with the format of their files, such as "CIFAR-10 (JPEG)"."""
    files = test.origin if isinstance(test, ImageSet) else test
    if data == "cifar10" or not isinstance(files, FileSet):
        return "CIFAR-10"
    suffixes = {Path(os.fsdecode(name)).suffix.removeprefix(".").upper() for name in files.paths}
    kinds = sorted({"JPEG" if suffix == "JPG" else suffix for suffix in suffixes})
    return f"CIFAR-10 ({', '.join(kinds)})"


def code_digest(flags: Mapping[str, Any]) -> str:
    """A digest of the package, its extension and the user's files that `flags` name.

    This account then knows those files, as the judge needs: what a lap remembers is gone with its cache.

    Raises:
        UserError: a file that `flags` name is not there.
    """
    own = [without_place(pin(value)) for value in flags.values() if isinstance(value, str)]
    named = [value for value in own if "#sha256=" in value]
    return hashlib.sha256(repr([package_digest(compiled=True), named]).encode()).hexdigest()[:16]


def _timed_in_child(lap: Lap, outcome: Path, lock: int) -> Values:
    """The `LapTimes` of `lap`, run in a new process with empty caches of compiled code and of timings.

    The record alone chooses the operators' implementation, not this process's environment.
    """
    with tempfile.TemporaryDirectory(prefix="fastdynat-lap-") as cache:
        empty = {
            "XDG_CACHE_HOME": cache,
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        words = [sys.executable, "-m", "fastdynat.commands.speedrun.lap", json.dumps(asdict(lap))]
        own = {name: value for name, value in os.environ.items() if name != KERNELS}
        done = subprocess.run([*words, str(outcome)], env=own | empty, check=False, pass_fds=(lock,))
    where = f"{lap.record}, seed {lap.seed}"
    values: Mapping[str, Any] = {}
    if outcome.exists():
        values = json.loads(outcome.read_text(encoding="utf-8"))
        if "seconds" not in values:
            outcome.unlink()
    if done.returncode in (130, 143, 129):
        raise KeyboardInterrupt
    if "seconds" not in values:
        if "diverged" in values:
            raise UserError(f"{where} diverged: {values['diverged']}")
        raise UserError(f"{where}: {values.get('error', f'its process ended with code {done.returncode}')}")
    return dict(values)


def _check_machine(race: Race) -> str:
    """The device of the race's track. Raises UserError where this machine is another."""
    track = race.records[0].track
    if track == "gpu-1" and not torch.cuda.is_available():
        raise UserError("track gpu-1 needs an H100 or H200, and there is no CUDA GPU here; use --track cpu-2")
    if track == "cpu-2" and own_cores() > CPU_CORES:
        raise UserError(
            f"track cpu-2 has {CPU_CORES} cores, and this process may use {own_cores()}: "
            "taskset -c 0,1 fastdynat speedrun ..."
        )
    if any(r.loop == "plain" for r in race.records) and importlib.util.find_spec("torchattacks") is None:
        raise UserError("the plain loop needs torchattacks: pip install 'fastdynat[peer]'")
    return "cpu" if track == "cpu-2" else "cuda"
