"""`fastdynat eval`: checkpoints of runs, and other models, under the same attacks, as tables and as JSON."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from fastdynat.commands.evaluate.cells import Cells, Known
from fastdynat.commands.evaluate.rank_checks import require_same_config, require_same_targets
from fastdynat.commands.evaluate.record import FORMAT, Values, make_record, with_unions
from fastdynat.commands.evaluate.settle import EvalConfig, check_eval_device, with_amp_chosen
from fastdynat.commands.evaluate.tables import print_results
from fastdynat.commands.evaluate.targets import Planner, Target, TestSets, check_names
from fastdynat.commands.evaluate.weights_files import is_weights_file
from fastdynat.distributed import all_can, first_decides, in_turns, world
from fastdynat.evaluation.measure import Stopped, exact_float32
from fastdynat.execution.process_state import process_state_kept
from fastdynat.ops import use_backend
from fastdynat.runs import WriteError, check_results, describe_environment
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.write_targets import is_file_target
from fastdynat.terminal.progress import ProgressDisplay

logger = logging.getLogger(__name__)


def evaluate_runs(
    names: Sequence[str | Path],
    config: EvalConfig,
    console: Console,
    *,
    quiet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Values]:
    """Measure, print tables, and return (and store) one record per network: `record.make_record`.

    Where `should_stop` ends it, what was finished is printed, stored and returned. Of several processes the
    first prints and stores; every one returns all records.

    Raises:
        UserError: see `measure_runs`.
    """
    first = world().first
    # Of path/to/file.py:callable, the file.
    files = [str(name).rpartition(":")[0] or None for name in (*names, config.source or "")]
    files += [str(name) for name in names if is_weights_file(name)]
    first_decides(lambda: check_results((config.json,), inputs=(config.weights, *files)))
    require_same_config(names, config)
    all_can(lambda: check_eval_device(config))
    all_can(lambda: check_names(names, config))
    config = _with_amp_of_first(config)
    display = ProgressDisplay(console, quiet=quiet or not first)
    records: list[Values] = []
    file = Path(config.json) if config.json and first else None
    # A pipe or a device is given the whole, once.
    partial = None if file is None or not is_file_target(file) else file

    def store(found: list[Values]) -> None:
        records[:] = found
        if partial is not None:
            with suppress(WriteError):  # the last one, when there is a table to show, says so
                write_text(partial, _text(config, found, complete=False))

    try:
        records[:] = measure_runs(names, config, display, store=store, should_stop=should_stop)
        stopped = False
    except Stopped:
        stopped = True
    if first:
        print_results(records, console, per_class=config.per_class)
        _log_cached(records)
    if stopped and first:
        kept = (
            "nothing was kept" if config.cache == "off" else "the same command goes on after what is finished"
        )
        logger.info("stopped: %s", kept)
    if file is not None:
        write_text(file, _text(config, records, complete=not stopped))
    return records


@process_state_kept()
def measure_runs(
    names: Sequence[str | Path],
    config: EvalConfig,
    display: ProgressDisplay,
    *,
    known: Known | None = None,
    tests: TestSets | None = None,
    store: Callable[[list[Values]], None] = lambda records: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Values]:
    """Measure the networks that `names` stand for and return one record per network.

    All networks are loaded and checked before the first is measured.

    Args:
        names: run directories, or names of models (`fastdynat.models.foreign.load_foreign`).
        known: measurements by all that they depend on: what is in it is not measured again, what is measured
            is put into it.
        tests: test sets that were read before; those that are read are put into it.
        store: given the records so far after each attack.
        should_stop: asked between batches and within long attacks.

    Raises:
        UserError: a path that is no run, a damaged or foreign checkpoint, an unknown attack, data that does
            not fit.
        Stopped: `should_stop` said so; `known` and the cache have what was measured.
    """
    device = check_eval_device(config)
    config = config if config.amp != "auto" else _with_amp_of_first(config)
    known = {} if known is None else known  # best and last are often one folder, which is then measured once
    records: list[Values] = []
    planner = Planner(config, {} if tests is None else tests)
    targets = in_turns(lambda: planner.plan(names))
    require_same_targets(targets)
    with exact_float32(), use_backend(config.kernels):
        for target in targets:
            done = list(records)

            def tell(record: Values, done: list[Values] = done) -> None:
                records[:] = with_unions([*done, record])
                store(records)

            _measure_target(target, config, device, known, display, should_stop, tell)
    return records


def _with_amp_of_first(config: EvalConfig) -> EvalConfig:
    """`config` with the precision that "auto" is on the machine of rank 0."""
    return replace(config, amp=first_decides(lambda: with_amp_chosen(config).amp))


def _measure_target(
    target: Target,
    config: EvalConfig,
    device: torch.device,
    known: Known,
    display: ProgressDisplay,
    should_stop: Callable[[], bool],
    tell: Callable[[Values], None],
) -> None:
    """Fill the columns of `target` one after the other; `tell` is given its record after each of them."""
    network = target.network.to(device).requires_grad_(False)
    cells = Cells(target, network, config, device, known=known, display=display, should_stop=should_stop)
    results: list[Values] = []
    for column in target.columns:
        results.append(cells.cell(column))
        tell(make_record(target, list(results), list(cells.cached), None))
    if config.checks:
        checks = _check(target, config, device, display, should_stop)
        tell(make_record(target, results, cells.cached, checks))
    for used in (target.network, *([target.source.network] if target.source else [])):
        used.cpu()


def _check(
    target: Target,
    config: EvalConfig,
    device: torch.device,
    display: ProgressDisplay,
    should_stop: Callable[[], bool],
) -> list[Values]:
    """Signs of masked gradients, each check as plain values."""
    from fastdynat.evaluation.masking import check_masking

    source = None if target.source is None else target.source.network.to(device).requires_grad_(False)

    with display.task(f"{target.title} checks", len(target.images), unit="images") as task:
        report = check_masking(
            target.network,
            target.images,
            norm=target.radius.norm,
            eps=target.radius.eps,
            device=device,
            batch_size=config.batch_size,
            seed=config.seed,
            source=source,
            on_ranks=True,
            should_stop=should_stop,
            advance=task.advance,
        )
    return [asdict(check) for check in report.checks]


def _text(config: EvalConfig, records: list[Values], *, complete: bool) -> str:
    """The JSON file."""
    document = {
        "format": FORMAT,
        "complete": complete,
        "config": asdict(config),
        "environment": describe_environment(),
        "results": records,
    }
    return json.dumps(document, indent=2) + "\n"


def _log_cached(records: list[Values]) -> None:
    count = sum(len(record["cached"]) for record in records)
    if count:
        logger.info(
            "%d results are from earlier evaluations (evaluations/*.json); --fresh measures them again", count
        )
