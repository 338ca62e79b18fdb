"""`fastdynat eval`: the checkpoints of one or more runs under the same attacks, as a table and as JSON."""

import hashlib
import json
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from fastdynat.attacks import NamedAttack, diameter, parse_attacks, usual_step
from fastdynat.config import AmpMode, CompileMode, DataConfig, Kernels, check_seed, read_yaml
from fastdynat.data import DatasetInfo, ImageSet, load_test
from fastdynat.devices import AMP_DTYPES, check_compile, check_kernels, pick_device
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import exact_float32, measure
from fastdynat.evaluation.outcome import Measurement
from fastdynat.ops import use_backend
from fastdynat.runs import (
    BEST,
    CONFIG,
    LAST,
    STATE,
    Sidecar,
    check_manifest,
    check_writable,
    describe_environment,
    foreign,
    load_network,
    read_sidecar,
    require_run,
)
from fastdynat.runs.files import write_text
from fastdynat.units import describe, parse_size

TestSets = dict[tuple[str, str, int | None], tuple[DatasetInfo, ImageSet]]  # by data, folder and image size


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate the best and last checkpoints of runs on the test set, in float32 unless told otherwise."""

    attacks: str = "clean,fgsm,pgd20,cw"
    """Comma-separated: clean, fgsm, pgdK or pgdK-R (K steps, R restarts), cwK (PGD on the margin loss)."""
    eps: float | str = "auto"
    """Radius: 8/255, 0.031, or 8 (read as 8/255); auto is the run's eval_eps."""
    step_size: float | str = "auto"
    """Step of pgd and cw; auto is eps / 4, or 10 eps under l0."""
    norm: Literal["auto", "linf", "l2", "l1", "l0"] = "auto"
    """Threat model; auto is the one the run was trained for."""
    checkpoints: Literal["both", "best", "last"] = "both"
    """Which checkpoints."""
    data: str = "auto"
    """Dataset; auto is the run's."""
    data_dir: str = "auto"
    """Where the dataset is; auto is the run's."""
    num_images: int | None = None
    """Use only the first so many test images (an image folder's classes take turns)."""
    batch_size: int = 500
    """Images per batch."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is a GPU if there is one."""
    amp: AmpMode = "off"
    """Mixed precision of the attack and of the prediction."""
    compile: CompileMode = "off"
    """torch.compile mode."""
    kernels: Kernels = "auto"
    """Implementation of the fused operators; auto is FASTDYNAT_KERNELS where it is set, else the best that is there."""
    seed: int = 1
    """Seed of the random starts."""
    json: str | None = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class _Job:
    """One checkpoint with what it is measured on."""

    run: Path
    checkpoint: str
    weights: str  # their sha256
    network: nn.Module
    sidecar: Sidecar
    attacks: list[NamedAttack]
    eps: float
    step_size: float
    norm: str
    images: ImageSet
    digest: str  # of the images


def evaluate_runs(paths: list[Path], config: EvalConfig, console: Console) -> list[dict[str, Any]]:
    """Measure every checkpoint of `paths`, print a table, and return (and store) one record per checkpoint.

    Raises:
        UserError: see `measure_runs`.
    """
    if config.json:
        check_writable(Path(config.json))

    def store(records: list[dict[str, Any]]) -> None:
        if config.json:
            write_text(Path(config.json), json.dumps(_document(config, records), indent=2) + "\n")

    records = measure_runs(paths, config, console, store=store)
    _print_table(records, console)
    return records


def measure_runs(
    paths: list[Path],
    config: EvalConfig,
    console: Console,
    *,
    known: MutableMapping[str, dict[str, Any]] | None = None,
    tests: TestSets | None = None,
    store: Callable[[list[dict[str, Any]]], None] = lambda records: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Measure every checkpoint of `paths` and return one record per checkpoint.

    All checkpoints are loaded and checked before the first is measured.

    Args:
        known: measurements by all that they depend on: what is in it is not measured again, what is measured is put into it.
        tests: test sets that were read before; those that are read are put into it.
        store: given the records so far after each checkpoint.
        should_stop: asked between batches.

    Raises:
        UserError: a path that is no run, a damaged or foreign checkpoint, an unknown attack, data that does not fit.
        Stopped: `should_stop` said so; `known` has what was measured.
    """
    check_seed(config.seed)
    if config.batch_size < 1 or (config.num_images is not None and config.num_images < 1):
        raise UserError(f"batch_size and num_images must be >= 1, got {config.batch_size} and {config.num_images}")
    device = pick_device(config.device)
    check_compile(config.compile, device)
    check_kernels(config.kernels, device)
    known = {} if known is None else known  # best and last are often one folder, which is then measured once
    jobs = _plan(paths, config, console, {} if tests is None else tests)
    records: list[dict[str, Any]] = []
    keys = {key: len(job.images) for job in jobs for key in (_key(job, attack, config) for attack in job.attacks)}
    progress = Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal)
    with exact_float32(), use_backend(config.kernels), progress as bar:
        task = bar.add_task("", total=sum(images for key, images in keys.items() if key not in known))

        def measured(network: nn.Module, job: _Job, attack: NamedAttack) -> Measurement:
            return measure(
                network,
                job.images,
                attack,
                device=device,
                batch_size=config.batch_size,
                seed=config.seed,
                amp_dtype=AMP_DTYPES[config.amp],
                should_stop=should_stop,
                advance=lambda n: bar.advance(task, n),
            )

        for job in jobs:
            bar.update(task, description=f"{job.run} {job.checkpoint}")
            records.append(_run_job(job, config, device, known, measured, console))
            store(records)
    return records


def _key(job: _Job, attack: NamedAttack, config: EvalConfig) -> str:
    """Everything that a measurement's accuracy depends on but the machine."""
    search = attack.search
    numbers = None if search is None else {"class": type(search).__name__, **asdict(search)}  # type: ignore[call-overload]
    parts: dict[str, Any] = {"weights": job.weights, "images": job.digest, "attack": attack.name, "search": numbers}
    parts |= {"seed": config.seed, "batch_size": config.batch_size, "amp": config.amp}
    return json.dumps(parts, sort_keys=True)


def _plan(paths: list[Path], config: EvalConfig, console: Console, tests: TestSets) -> list[_Job]:
    jobs: list[_Job] = []
    for path in paths:
        require_run(path)
        stored = read_yaml(path / CONFIG)
        if not isinstance(stored.get("data"), str) or not isinstance(stored.get("data_dir"), str):
            raise UserError(f"{path / CONFIG} names no data and data_dir: it was damaged or edited")
        data = stored["data"] if config.data == "auto" else config.data
        # Another dataset is not looked for, nor downloaded, where the run's own lies.
        folder = stored["data_dir"] if data == stored["data"] else DataConfig().data_dir
        folder = folder if config.data_dir == "auto" else config.data_dir
        key = (data, folder, stored.get("image_size"))
        for checkpoint in (BEST, LAST) if config.checkpoints == "both" else (config.checkpoints,):
            if not (path / checkpoint).exists():
                hint = "; use --checkpoints last" if checkpoint == BEST and (path / LAST).exists() else ""
                raise UserError(f"{path} has no {checkpoint} checkpoint: no epoch of it was validated yet{hint}")
            # The link is followed once: the run may still be training, and move it.
            files = (path / checkpoint).resolve()
            check_manifest(files, optional=(STATE,))
            network, sidecar = load_network(files / "model.safetensors")
            weights = read_sidecar(files / "model.safetensors")[1]
            if key not in tests:
                tests[key] = load_test(data, folder, image_size=key[2], download=bool(stored.get("download", True)))
            info, images = tests[key][0], _first(tests[key][1], config.num_images)
            _check_data(sidecar, info, path)
            measured = _attacks(config, sidecar, console)
            jobs.append(_Job(path, checkpoint, weights, network, sidecar, *measured, images, _digest(images)))
    return jobs


def _attacks(config: EvalConfig, sidecar: Sidecar, console: Console) -> tuple[list[NamedAttack], float, float, str]:
    norm = sidecar.norm if config.norm == "auto" else config.norm
    if norm != sidecar.norm and config.eps == "auto":
        raise UserError(f"the run was trained under {sidecar.norm}; --norm {norm} needs --eps")
    limit = diameter(norm, sidecar.image_shape)
    values = []
    for what, text, automatic in (("eps", config.eps, sidecar.eval_eps), ("step_size", config.step_size, None)):
        size = None if text == "auto" else parse_size(text, what, norm=norm, limit=limit)
        if size is not None and size.notice:
            console.print(size.notice, markup=False)
        values.append(automatic if size is None else size.value)
    eps = float(values[0])  # type: ignore[arg-type]
    step_size = usual_step(norm, eps) if values[1] is None else values[1]
    return parse_attacks(config.attacks, eps=eps, step_size=step_size, norm=norm), eps, step_size, norm


def _check_data(sidecar: Sidecar, info: DatasetInfo, run: Path) -> None:
    difference = foreign(sidecar, info)
    if difference:
        raise UserError(f"{run} was trained on {difference}")


def _first(images: ImageSet, count: int | None) -> ImageSet:
    return images if count is None else ImageSet(images.images[:count], images.labels[:count])


def _digest(images: ImageSet) -> str:
    """The sha256 of all pixels and labels."""
    digest = hashlib.sha256()
    for tensor in (images.images, images.labels):
        digest.update(tensor.contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _run_job(
    job: _Job,
    config: EvalConfig,
    device: torch.device,
    known: MutableMapping[str, dict[str, Any]],
    measured: Callable[[nn.Module, _Job, NamedAttack], Measurement],
    console: Console,
) -> dict[str, Any]:
    network = job.network.to(device).requires_grad_(False)
    if config.compile != "off":
        network = torch.compile(network, mode=config.compile, dynamic=False)  # type: ignore[assignment]
    results: list[dict[str, Any]] = []
    for attack in job.attacks:
        key = _key(job, attack, config)
        if key not in known:
            r = measured(network, job, attack)
            known[key] = asdict(r)
            speed = f"{r.seconds:.1f} s, {r.images_per_s:,.0f} img/s"
            line = f"{job.run} {job.checkpoint}: {r.attack} {100 * r.accuracy:.2f} % ({speed})"
            console.print(line, markup=False, highlight=False)
        results.append(known[key])
    accuracy = {r["attack"]: r["accuracy"] for r in results}
    robust = [value for name, value in accuracy.items() if name != "clean"]
    job.network.cpu()
    return {
        "run": str(job.run),
        "checkpoint": job.checkpoint,
        "weights_sha256": job.weights,
        "method": job.sidecar.method,
        "architecture": job.sidecar.architecture,
        "dataset": job.sidecar.dataset,
        "epoch": job.sidecar.epoch,
        "norm": job.norm,
        "eps": job.eps,
        "step_size": job.step_size,
        "images": len(job.images),
        "robustness_gap": accuracy["clean"] - min(robust) if "clean" in accuracy and robust else None,
        "attacks": results,
    }


def _document(config: EvalConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": "fastdynat-eval/1",
        "config": asdict(config),
        "environment": describe_environment(),
        "results": records,
    }


def _print_table(records: list[dict[str, Any]], console: Console) -> None:
    names = list(dict.fromkeys(a["attack"] for r in records for a in r["attacks"]))
    radii = sorted({f"{r['norm']} eps {describe(r['eps'])}" for r in records})
    table = Table(title=f"accuracy in %, {records[0]['images']} test images, {', '.join(radii)}", title_justify="left")
    for column in ("run", "method", "checkpoint", "epoch"):
        table.add_column(column, no_wrap=column != "run")
    for column in (*names, "gap"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        cells = {a["attack"]: f"{100 * a['accuracy']:.2f}" for a in r["attacks"]}
        gap = "-" if r["robustness_gap"] is None else f"{100 * r['robustness_gap']:.2f}"
        table.add_row(r["run"], r["method"], r["checkpoint"], str(r["epoch"]), *(cells.get(n, "-") for n in names), gap)
    console.print(table)
