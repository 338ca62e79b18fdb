"""A benchmark from its configuration to the tables and files."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdynat.commands.bench.auto import run_auto
from fastdynat.commands.bench.baseline import compare_with_baseline, read_baseline, report_baseline
from fastdynat.commands.bench.bench_config import BenchConfig, check_bench
from fastdynat.commands.bench.flops import StepFlops, count_step
from fastdynat.commands.bench.phases import time_phases
from fastdynat.commands.bench.profiling import profile_step
from fastdynat.commands.bench.results import (
    bench_document,
    epoch_values,
    first_looks,
    phase_values,
    print_document,
)
from fastdynat.commands.bench.roofline import copy_rate, measured_parts, peak_of, roofline_values
from fastdynat.commands.bench.rows import (
    BenchRow,
    BenchSetup,
    asked_step,
    left_out,
    plans,
    prepare_rows,
    time_rows,
)
from fastdynat.commands.bench.settings import label, resolved_setting
from fastdynat.commands.bench.step_memory import checkpointing_values
from fastdynat.commands.bench.stopwatch import MIN_ROUNDS, Samples, Stopwatch
from fastdynat.commands.bench.work import Work, engine_step
from fastdynat.commands.figures import PICTURES
from fastdynat.config import TrainConfig
from fastdynat.data import Batch, DatasetInfo, TrainSplit, dataset_info
from fastdynat.data.random_images import random_split
from fastdynat.errors import UserError
from fastdynat.execution.process_state import process_state_kept
from fastdynat.machine import OtherLoad
from fastdynat.methods import Method, method_class
from fastdynat.methods.madry import Madry
from fastdynat.models import build_model
from fastdynat.ops import use_backend
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.write_targets import target_file
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training import build_parts, open_split
from fastdynat.training.resolve import resolve
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.tuning.devices import AMP_DTYPES


@process_state_kept()
def run_benchmark(
    asked: TrainConfig[Any], bench: BenchConfig, console: Console, display: ProgressDisplay
) -> int:
    """Measure, print and store. Returns 0, or 1 where a row is invalid or slower than the baseline allows.

    Raises:
        UserError: a value that cannot work, before anything is measured or written.
    """
    check_bench(bench)
    split = _images(asked, bench)
    if bench.auto:
        doc, ok = run_auto(
            asked, split, lambda c: resolved_setting(c, split), bench.seconds, bench.repeats, console, display
        )
        _store(doc, bench)
        return 0 if ok else 1
    full = resolved_setting(asked, split, announce=True)
    before = None if bench.baseline is None else read_baseline(Path(bench.baseline), full)
    doc = _measure(asked, full, split, bench, display)
    print_document(doc, console)
    ok = True
    if before is not None:
        doc["baseline"] = compare_with_baseline(before, doc)
        ok = report_baseline(doc["baseline"], str(bench.baseline), bench.tolerance, console)
    _store(doc, bench)
    return 0 if ok else 1


def _images(asked: TrainConfig[Any], bench: BenchConfig) -> TrainSplit:
    """Random images; the dataset where an epoch of it is timed or its shape is unknown."""
    info = dataset_info(asked.data.data)
    if info is None or bench.epoch:
        return open_split(asked)
    config = resolve(asked, info, announce=False)
    if config.data.image_size is not None:
        size = config.data.image_size
        info = replace(info, image_shape=(info.image_shape[0], size, size))
    return random_split(info, config.data.batch_size, config.engine.seed)


def _measure(
    asked: TrainConfig[Any],
    full: ResolvedConfig[Any],
    split: TrainSplit,
    bench: BenchConfig,
    display: ProgressDisplay,
) -> dict[str, Any]:
    device = torch.device(full.engine.device)
    watch, load = Stopwatch(device), OtherLoad()
    flops, copied = _count(full, split.info), copy_rate(watch, device)

    setup = BenchSetup(
        asked,
        full,
        lambda config: resolved_setting(config, split),
        split,
        full.attack.steps * flops.attack_step,
        flops.step,
    )
    row_plans = plans(setup, bench)

    def so_far(ready: list[BenchRow]) -> None:
        display.line(f"so far: {', '.join(first_looks(ready))}")
        about = {
            "flops": flops.values(),
            "phases": {},
            "phases_of": "",
            "epoch": epoch_values(asked_step(ready), None),
        }
        about["roofline"] = roofline_values(
            flops, full, peak_of(ready, full, copied), measured_parts(ready, {})
        )
        doc = bench_document(
            full, ready, left_out(row_plans, ready), **about, profile=None, other_load=load.share()
        )
        _keep_partial(doc, bench)

    rows = prepare_rows(row_plans, watch, device, bench, display, so_far)
    display.line("timing")
    time_rows(rows, watch, bench)
    so_far(rows)
    own = asked_step(rows)
    phases, kinds, setting = _inside(setup, own, watch, bench)
    apart = {} if setting != label(full) else {name: samples.median for name, samples in phases.items()}
    checkpointing = checkpointing_values(setup, rows)
    measured = _epoch(full, split, watch, display) if bench.epoch else None
    return bench_document(
        full,
        rows,
        left_out(row_plans, rows),
        flops=flops.values(),
        roofline=roofline_values(flops, full, peak_of(rows, full, copied), measured_parts(rows, apart)),
        phases=phase_values(phases),
        phases_of=setting,
        epoch=epoch_values(own, measured),
        profile=kinds,
        checkpointing=checkpointing,
        other_load=load.share(),
    )


def _count(config: ResolvedConfig[Any], info: DatasetInfo) -> StepFlops:
    method = method_class(config.method)(config.options)
    own = type(method).perturb not in (Method.perturb, Madry.perturb)
    if own or bool(getattr(method.options, "prior_epochs", 0)):
        raise UserError(
            f"bench times PGD, but method {method.name} uses its own search; time another, such as madry"
        )

    def build(name: str) -> torch.nn.Module:
        return build_model(name, num_classes=info.num_classes, image_shape=info.image_shape)

    guide = build(config.model.guide) if method.uses_guide else None
    numbers: dict[str, Any] = {"batch_size": config.data.batch_size, "awp": config.attack.awp > 0}
    return count_step(
        method, build(config.model.model), guide, info.image_shape, config.attack.steps, **numbers
    )


def _inside(
    setup: BenchSetup, own: BenchRow | None, watch: Stopwatch, bench: BenchConfig
) -> tuple[dict[str, Samples], dict[str, float] | None, str]:
    """Phases and kinds of operation of one step, and the setting of that step in words."""
    engine = setup.full.engine
    apart = replace(engine, graphs="off", guide_stream="off")
    config = replace(setup.full, engine=apart)
    setting = label(config) + (" without CUDA graphs and guide stream" if apart != engine else "")
    if own is None:
        return {}, None, setting
    ready = own.work if apart == engine else _again(config, setup, watch)
    assert ready.step is not None
    assert ready.stream is not None
    with use_backend(config.engine.kernels):
        phases = time_phases(ready.step, ready.stream, watch, bench.repeats or 2 * MIN_ROUNDS)
    if not bench.profile:
        return phases, None, setting
    if engine.compile != "off" and not watch.gpu:
        # Inductor's kernels on the CPU are seen by the profiler only if they were compiled to be.
        with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
            ready = _again(config, setup, watch)
    return phases, profile_step(ready.call, watch, AMP_DTYPES[engine.amp] or torch.float32), setting


def _again(config: ResolvedConfig[Any], setup: BenchSetup, watch: Stopwatch) -> Work:
    """The step of `config`, warm."""
    ready = engine_step(config, setup.split)
    watch.time(ready.call, 3)
    return ready


def _epoch(
    config: ResolvedConfig[Any], split: TrainSplit, watch: Stopwatch, display: ProgressDisplay
) -> dict[str, Any]:
    """One training epoch on `split`, compiled and warm, with its shorter last batch, without validation."""
    display.line("one epoch")
    _, step, loader = build_parts(config, split)
    with use_backend(config.engine.kernels):
        first: Batch = next(iter(loader.epoch(0)))
        last: Batch = next(iter(loader.epoch(0, loader.steps_per_epoch - 1)))
        for batch in (first, last):
            watch.time(lambda batch=batch: step(batch), 5)  # type: ignore[misc]
        begin, images = time.perf_counter(), 0
        for batch in loader.epoch(0):
            step(batch)
            images += len(batch.labels)
        watch.wait()
        seconds = time.perf_counter() - begin
    return {
        "data": config.data.data,
        "seconds": round(seconds, 4),
        "images": images,
        "images_per_s": round(images / seconds, 2),
    }


def _partial(bench: BenchConfig) -> Path | None:
    """The file of unfinished results; None where --json is a pipe, a device or absent."""
    path = None if bench.json is None else target_file(Path(bench.json))
    return None if path is None else path.with_name(path.name + ".partial")


def _keep_partial(doc: Mapping[str, Any], bench: BenchConfig) -> None:
    """Write the results so far beside the --json file, for an interruption or a time limit."""
    path = _partial(bench)
    if path is not None:
        write_text(path, json.dumps({**doc, "complete": False}, indent=1) + "\n")


def _store(doc: Mapping[str, Any], bench: BenchConfig) -> None:
    if bench.json:
        write_text(Path(bench.json), json.dumps(doc, indent=1) + "\n")
        if (partial := _partial(bench)) is not None:
            partial.unlink(missing_ok=True)
    if bench.chart:
        from fastdynat.commands.bench.bench_charts import (
            draw_rates,  # extra `plots`, which `check_bench` has looked for
        )

        draw_rates(doc, Path(bench.chart))
    if bench.profile:
        _store_kinds(doc, Path(bench.profile))


def _store_kinds(doc: Mapping[str, Any], path: Path) -> None:
    if path.suffix not in PICTURES:
        keep = ("format", "command", "commit", "environment", "settings", "phases_of", "profile")
        write_text(path, json.dumps({key: doc[key] for key in keep}, indent=1) + "\n")
        return
    from fastdynat.commands.bench.bench_charts import draw_kinds

    draw_kinds(doc["profile"] or {}, f"one training step, {doc['phases_of']}", path)
