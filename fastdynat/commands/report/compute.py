"""Findings of all runs: from the cache, or computed and put there, one after the other with progress."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdynat.commands.report import findings
from fastdynat.commands.report.findings import AttackedNetwork, Means
from fastdynat.commands.report.findings_cache import Cache
from fastdynat.commands.report.report_config import ReportConfig
from fastdynat.commands.report.run_records import Record, ReportedCheckpoint
from fastdynat.data import DatasetInfo, Images, load_test
from fastdynat.errors import UserError
from fastdynat.evaluation import Stopped
from fastdynat.evaluation.measure import exact_float32
from fastdynat.ops import image_draws
from fastdynat.runs import check_test_images, code_version, data_difference, load_network
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.terminal.stop_request import StopRequest
from fastdynat.tuning.devices import pick_device

# Of one network. Tests put functions of their own here.
KINDS: dict[str, Callable[[AttackedNetwork, Means], dict[str, Any]]] = {
    "curve": findings.curve,
    "nearest": findings.nearest_distances,
    "examples": findings.examples,
    "masking": findings.masking,
}


@dataclass
class Findings:
    """Plain values by kind and name of the run; `transfers` one for each group of runs that have data and
    radius in common.
    """

    of_run: dict[str, dict[str, Any]]
    transfers: list[dict[str, Any]] = field(default_factory=list)
    signal: int | None = None  # that stopped the computation before its end


@dataclass(frozen=True)
class _Target:
    """A run's checkpoint that is attacked."""

    record: Record
    checkpoint: ReportedCheckpoint

    @property
    def data(self) -> dict[str, Any]:
        return {name: self.record.config.get(name) for name in ("data", "data_dir", "image_size")}

    @property
    def threat(self) -> dict[str, Any]:
        """The threat model: runs that differ in --eval-eps alone may share their weights."""
        return {"norm": self.checkpoint.sidecar.norm, "eps": self.checkpoint.sidecar.eval_eps}

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal where networks can be attacked by each other's images."""
        s = self.checkpoint.sidecar
        return (*self.data.values(), s.image_shape, s.class_names, *self.threat.values())


class _Workshop:
    """Loads what a finding needs, when the first one needs it."""

    def __init__(self, config: ReportConfig) -> None:
        self.config, self.device = config, pick_device(config.device)
        self._tests: dict[tuple[Any, ...], tuple[DatasetInfo, Images]] = {}
        self._subjects: dict[Path, AttackedNetwork] = {}  # by the checkpoint's path

    def images(self, target: _Target) -> tuple[DatasetInfo, Images]:
        """The dataset of `target` and its first test images."""
        key = tuple(target.data.values())
        if key not in self._tests:
            folder = target.data["data_dir"] if self.config.data_dir == "auto" else self.config.data_dir
            try:
                info, images = load_test(
                    str(target.data["data"]), folder, image_size=target.data["image_size"], download=False
                )
            except UserError as error:
                raise UserError(f"{error}; or --no-attacks, which needs no data") from None
            self._tests[key] = info, images.part(slice(self.config.num_images))
        return self._tests[key]

    def subject(self, target: _Target) -> AttackedNetwork:
        """The network of `target` on the device, and its images."""
        path = target.checkpoint.path
        if path not in self._subjects:
            network, sidecar = load_network(path)
            info, images = self.images(target)
            if difference := data_difference(sidecar, info):
                raise UserError(f"{target.record.path} was trained on {difference}")
            check_test_images(sidecar, info, str(target.record.path))
            network = network.to(self.device).requires_grad_(False)
            self._subjects[path] = AttackedNetwork(
                network, images, sidecar.norm, sidecar.eval_eps, sidecar.class_names
            )
        return self._subjects[path]


@dataclass(frozen=True)
class _Task:
    """One finding that is asked for; `passes` is how often it looks at each image, as its progress counts."""

    about: str
    passes: int
    key: dict[str, Any]
    compute: Callable[[_Workshop, Means], dict[str, Any]]
    keep: Callable[[dict[str, Any]], None]


def gather(
    records: Sequence[Record], config: ReportConfig, cache: Cache, display: ProgressDisplay
) -> Findings:
    """All findings of `records`; those that are not in the cache are computed, unless `config` says no.

    Raises:
        UserError: a dataset or a checkpoint that cannot be used.
    """
    found = Findings({kind: {} for kind in KINDS})
    missing = []
    for task in _tasks(records, config, found):
        value = cache.get(task.key)
        if value is None:
            missing.append(task)
        else:
            task.keep(value)
    if config.attacks and missing:
        found.signal = _compute(missing, _Workshop(config), cache, display)
    return found


def _tasks(records: Sequence[Record], config: ReportConfig, found: Findings) -> Iterator[_Task]:
    settings = {
        "images": config.num_images,
        "seed": config.seed,
        "draws": image_draws.VERSION,
        "version": code_version(),
        "given_data_dir": config.data_dir,
    }
    targets = [_Target(r, c) for r in records if (c := r.checkpoint(config.checkpoint)) is not None]
    for target in targets:
        for kind, function in KINDS.items():
            if kind == "nearest" and target.checkpoint.sidecar.norm not in findings.NEAREST:
                continue
            key = {
                "kind": kind,
                "weights": target.checkpoint.weights,
                **target.threat,
                **target.data,
                **settings,
            }

            def compute(
                shop: _Workshop, means: Means, target: _Target = target, function: Any = function
            ) -> dict[str, Any]:
                value: dict[str, Any] = function(shop.subject(target), means)
                return value

            def keep(value: dict[str, Any], kind: str = kind, name: str = target.record.name) -> None:
                found.of_run[kind][name] = value

            passes = len(findings.RADII) if kind == "curve" else 1
            yield _Task(f"{target.record.name}: {kind}", passes, key, compute, keep)
    yield from _transfers(targets, settings, found)


def _transfers(targets: Sequence[_Target], settings: dict[str, Any], found: Findings) -> Iterator[_Task]:
    groups: dict[tuple[Any, ...], list[_Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    for group in groups.values():
        weights = {t.record.name: t.checkpoint.weights for t in group}
        key = {"kind": "transfer", "weights": weights, **group[0].threat, **group[0].data, **settings}

        def compute(shop: _Workshop, means: Means, group: list[_Target] = group) -> dict[str, Any]:
            return findings.transfer_between(
                {target.record.name: shop.subject(target) for target in group}, means
            )

        if len(group) > 1:
            yield _Task(
                f"transfer between {len(group)} runs", len(group), key, compute, found.transfers.append
            )


def _compute(tasks: Sequence[_Task], shop: _Workshop, cache: Cache, display: ProgressDisplay) -> int | None:
    """Do the tasks; returns the signal that stopped them, if one did."""
    images = shop.config.num_images
    total = sum(images * task.passes for task in tasks)
    with StopRequest() as stop, display.task("", total) as bar, exact_float32():
        means = Means(shop.device, shop.config.batch_size, shop.config.seed, stop.requested, bar.advance)
        for number, task in enumerate(tasks, 1):
            bar.update(title=task.about)
            start = time.perf_counter()
            try:
                value = task.compute(shop, means)
            except Stopped:
                return stop.signal
            cache.put(task.key, value)
            task.keep(value)
            bar.update(completed=images * sum(done.passes for done in tasks[:number]))
            display.line(f"[{number}/{len(tasks)}] {task.about} ({time.perf_counter() - start:.1f} s)")
            if stop.requested():
                return stop.signal
    return None
