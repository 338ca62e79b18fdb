"""A comparison from its configuration to table, files and chart."""

import gc
import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdynat.commands.compare.compare_config import CompareConfig, NoOptions
from fastdynat.commands.compare.comparison_results import comparison_document
from fastdynat.commands.compare.comparison_table import print_comparison
from fastdynat.commands.compare.run_plans import ComparisonPlan, RunPlan, make_plan
from fastdynat.commands.evaluate.measure_runs import measure_runs
from fastdynat.commands.evaluate.settle import EvalConfig
from fastdynat.config import TrainConfig
from fastdynat.errors import UserError
from fastdynat.evaluation import Stopped
from fastdynat.execution.process_state import process_state_kept
from fastdynat.machine.peak_memory import PeakMemory
from fastdynat.runs import WriteError, lock_folder, looks_like_run
from fastdynat.runs.atomic_files import make_folder, write_text
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.terminal.stop_request import StopRequest
from fastdynat.training import Diverged, Outcome, new_run, resumed_run

logger = logging.getLogger(__name__)

RESULTS = "compare.json"


@process_state_kept()
def compare_methods(
    shared: TrainConfig[NoOptions], compare: CompareConfig, console: Console, display: ProgressDisplay
) -> int:
    """Train, evaluate, print and store. Returns 0, 1 where a run diverged, 128+n where signal n stopped it.

    Args:
        console: for the table.

    Raises:
        UserError: a value that cannot work, before anything is trained or written.
    """
    plan = make_plan(shared, compare)
    make_folder(plan.out)
    with lock_folder(plan.out), _how_to_go_on(plan.out):
        plan.ledger.save()
        records: dict[str, list[dict[str, Any]]] = {}
        for number, run in enumerate(plan.runs, 1):
            display.line(f"[{number}/{len(plan.runs)}] {run.method}, seed {run.seed}: {run.path}")
            stopped = _train(run, plan) or _evaluate(run, plan, compare, records, display)
            if stopped:
                logger.info(
                    "stopped and saved; the same command goes on, with --out %s", shlex.quote(str(plan.out))
                )
                return stopped
        doc = comparison_document(plan, shared, compare, records)
        print_comparison(doc, console)
        _store(doc, plan.out, compare)
        logger.info("done: %s", plan.out / RESULTS)
    return 1 if any(run["ended"] == "diverged" for run in doc["runs"]) else 0


@contextmanager
def _how_to_go_on(out: Path) -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise UserError(
            f"{error}; make room: the same command goes on, with --out {shlex.quote(str(out))}"
        ) from None


def _train(run: RunPlan, plan: ComparisonPlan) -> int:
    """Start or resume `run` unless it has ended. Returns 0, or 128+n if signal n stopped it."""
    runs = plan.ledger.runs
    if plan.ledger.has_ended(run.path):
        return 0
    begun_before = looks_like_run(run.path)
    entry = runs.get(run.name, {}) if begun_before else {}
    # What earlier runs left goes first: their memory is not this one's.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    memory = PeakMemory(torch.device(run.config.engine.device))
    try:
        begun = resumed_run(run.path, run.asked) if begun_before else new_run(run.asked)
        with begun as trainer:
            logger.info("attack: %s; step: %s", trainer.networks.attack.path, trainer.step.path)
            outcome = trainer.fit()
        ended = {"ended": "finished", "reason": outcome.early or ""} if outcome.finished else {}
    except Diverged as error:
        logger.error("%s, seed %d diverged: %s", run.method, run.seed, error)
        outcome, ended = Outcome(True), {"ended": "diverged", "reason": str(error)}
    peak = (memory.peak() or 0) if memory.exact else 0
    runs[run.name] = ended | {"peak_memory_bytes": max(peak, entry.get("peak_memory_bytes") or 0) or None}
    plan.ledger.save()
    return 128 + outcome.signal if outcome.signal else 0


def _evaluate(
    run: RunPlan,
    plan: ComparisonPlan,
    compare: CompareConfig,
    records: dict[str, list[dict[str, Any]]],
    display: ProgressDisplay,
) -> int:
    """Put the records of `run`'s checkpoints into `records`. Returns 0, or the exit code of the signal that
    stopped it.
    """
    if plan.ledger.runs[run.name]["ended"] == "diverged":
        return 0
    data, engine = run.config.data, run.config.engine
    config = EvalConfig(
        attacks=compare.attacks, batch_size=data.eval_batch_size, device=engine.device, kernels=engine.kernels
    )
    with StopRequest() as stop, suppress(Stopped):
        records[run.name] = measure_runs(
            [run.path], config, display, known=plan.ledger, tests=plan.tests, should_stop=stop.requested
        )
    return 128 + stop.signal if stop.signal else 0


def _store(doc: dict[str, Any], out: Path, compare: CompareConfig) -> None:
    for path in (out / RESULTS, compare.json):
        if path is not None:
            write_text(Path(path), json.dumps(doc, indent=1) + "\n")
    if compare.chart:
        from fastdynat.commands.compare.comparison_chart import (
            draw_comparison,  # extra `plots`, which `check_compare` has looked for
        )

        draw_comparison(doc, Path(compare.chart))
