"""The cells of one network's row: taken from what is known, or measured."""

import logging
from collections.abc import Callable, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attacks import NamedAttack
from fastdynat.commands.evaluate.columns import AttackColumn, Reference
from fastdynat.commands.evaluate.measurement_store import (
    Key,
    Store,
    as_measurement,
    search_numbers,
    standing_digest,
)
from fastdynat.commands.evaluate.record import judged_radius
from fastdynat.commands.evaluate.reference_autoattack import run_reference
from fastdynat.commands.evaluate.settle import EvalConfig
from fastdynat.commands.evaluate.shards import unite
from fastdynat.commands.evaluate.targets import Target
from fastdynat.distributed import first_decides, world
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import Stopped, measure
from fastdynat.evaluation.measure_on_ranks import measure_on_ranks
from fastdynat.evaluation.outcome import Measurement, unpack_bits
from fastdynat.evaluation.unit_images import UnitImages
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.ops import image_draws
from fastdynat.runs import check_writable, code_version
from fastdynat.runs.atomic_files import make_folder
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.tuning.devices import AMP_DTYPES

logger = logging.getLogger(__name__)

Known = MutableMapping[str, dict[str, Any]]
CLEAN = NamedAttack("clean")


class Cells:
    """Fills the columns of `target`, whose network is on `device`.

    Every process of the world fills the same ones; the first reads and writes the files.

    Attributes:
        cached: names of the measurements that came from files.
    """

    def __init__(
        self,
        target: Target,
        network: nn.Module,
        config: EvalConfig,
        device: torch.device,
        *,
        known: Known,
        display: ProgressDisplay,
        should_stop: Callable[[], bool],
    ) -> None:
        self.target, self.network, self.config, self.device = target, network, config, device
        self.display, self.should_stop = display, should_stop
        self.cached: list[str] = []
        self._fallbacks = Fallbacks()  # one for all attacks: each is reported once
        self._known = known
        folder = target.folder if world().first else None
        self._store = None if folder is None else Store(folder, target.about)
        self._images = target.images

    def cell(self, column: AttackColumn) -> dict[str, Any]:
        """The column's measurement as JSON holds it; of one with stages also theirs.

        Raises:
            Stopped: `should_stop` said so; what was finished is kept.
        """
        if column.stages:
            return self._staged(column)
        if column.reference is not None:
            return asdict(self._reference(column.name, column.reference))
        assert column.attack is not None
        return asdict(self._attacked(column.attack, transfer=column.transfer))

    def _attacked(
        self, attack: NamedAttack, *, transfer: bool = False, standing: Tensor | None = None
    ) -> Measurement:
        target, config = self.target, self.config
        source = target.source if transfer else None
        images = len(self._images) if standing is None else int(standing.sum())

        def run(own: Tensor | None, batch_size: int) -> Measurement:
            # The images of this process stand for those of all.
            scale = 1.0 if own is None else images / max(1, int(own.sum()))
            with self.display.task(f"{target.title} {attack.name}", images, unit="images") as task:
                return measure(
                    self.network,
                    self._images,
                    attack,
                    device=self.device,
                    batch_size=batch_size,
                    seed=config.seed,
                    amp_dtype=AMP_DTYPES[config.amp],
                    source=None if source is None else source.network.to(self.device).requires_grad_(False),
                    standing=own,
                    numbers=target.numbers,
                    compile_mode=config.compile,
                    fallbacks=self._fallbacks,
                    should_stop=self.should_stop,
                    advance=lambda done: task.advance(scale * done),
                )

        key = self._key(
            attack.name,
            attack.search,
            batch_size=None if attack.draws_per_image else config.batch_size,
            standing=standing,
            source=None if source is None else source.weights,
        )
        # More images than there are never make a batch.
        batch_size = max(1, min(config.batch_size, images))
        labels = self._images.labels

        def measured() -> Measurement:
            return measure_on_ranks(run, attack, labels, batch_size=batch_size, standing=standing)

        return self._once(key, standing, measured, attack.search)

    def _staged(self, column: AttackColumn) -> dict[str, Any]:
        """The stages in order, each on the images still robust after those before, first clean accuracy."""
        numbers = {"stages": [search_numbers(stage.search) for stage in column.stages]}
        key = self._key(column.name, None, numbers=numbers)
        stages = [self._attacked(CLEAN)]
        for stage in column.stages:
            stages.append(self._attacked(stage, standing=_standing(stages[-1])))
        whole = self._once(key, None, lambda: _chain(column.name, stages[1:], self._images.labels))
        return {**asdict(whole), "stages": [asdict(stage) for stage in stages]}

    def _reference(self, name: str, numbers: Reference) -> Measurement:
        key = self._key(name, numbers, batch_size=self.config.batch_size, own_draws=False)
        state = self._state(key)
        found = self._once(key, None, lambda: self._run_reference(name, numbers, state))
        if state is not None:
            state.unlink(missing_ok=True)
        return found

    def _state(self, key: Key) -> Path | None:
        """The file in which an interrupted run of the package keeps its state; None, with a warning, where it
        cannot be written."""
        if self._store is None:
            return None
        path = self._store.path(key.text(), ".state")
        try:
            make_folder(path.parent)
            check_writable(path)
        except UserError:
            logger.warning(
                "cannot write to %s, so %s would start over after an interruption; use --cache DIR",
                path.parent,
                key.attack,
            )
            return None
        return path

    def _run_reference(self, name: str, numbers: Reference, state: Path | None) -> Measurement:
        if state is not None and self.config.fresh:
            state.unlink(missing_ok=True)
        labels = self._images.labels
        robust, seconds = run_reference(
            Watched(self.network, self.should_stop),
            UnitImages(self._images),
            labels,
            norm=numbers.norm,
            eps=numbers.eps,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            device=self.device,
            version=numbers.version,
            state_path=state,
        )
        stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
        self.display.line(f"{self.target.title}: {name}: {stages}")
        return Measurement.of(
            name,
            robust.cpu(),
            labels,
            classes=int(labels.max()) + 1,
            seconds=sum(seconds.values()),
            batch_size=self.config.batch_size,
        )

    def _key(
        self,
        name: str,
        search: Any,
        *,
        batch_size: int | None = None,
        own_draws: bool = True,
        numbers: dict[str, Any] | None = None,
        standing: Tensor | None = None,
        source: str | None = None,
    ) -> Key:
        return Key(
            weights=self.target.weights,
            images=self.target.digest,
            attack=name,
            search=search_numbers(search) if numbers is None else numbers,
            seed=self.config.seed,
            batch_size=batch_size,
            draws=image_draws.VERSION if own_draws else None,
            amp=self.config.amp,
            source=source,
            standing=standing_digest(standing),
            shard=None if self.target.shard is None else str(self.target.shard),
            version=code_version(),
        )

    def _once(
        self,
        key: Key,
        standing: Tensor | None,
        run: Callable[[], Measurement],
        search: Any = None,
    ) -> Measurement:
        """The measurement of `key` from this call, a file or shards; else of `run`, then stored.

        search: of the attack; None is clean accuracy or AutoAttack.
        """
        text = key.text()
        if text in self._known:
            return as_measurement(self._known[text])
        found = None if self.config.fresh else first_decides(lambda: self._find(key, standing))
        if found is None:
            found, how = run(), ""
            if self._store is not None:
                norm, eps = judged_radius(search, found.distances, self.target.radius)
                self._store.put(text, asdict(found), {"attack_norm": norm, "attack_eps": eps})
        else:
            self.cached.append(key.attack)
            how = "from an earlier evaluation: "
        self._known[text] = asdict(found)
        how += f"{found.seconds:.1f} s, {found.images_per_s:,.0f} img/s"
        self.display.line(f"{self.target.title}: {found.attack} {100 * found.accuracy:.2f} % ({how})")
        return found

    def _find(self, key: Key, standing: Tensor | None) -> Measurement | None:
        store = self._store
        if store is None:
            return None

        def look_up(key: Key) -> Measurement | None:
            stored = store.get(key.text())
            return None if stored is None else as_measurement(stored)

        found = look_up(key)
        if found is not None or key.shard is not None:
            return found
        return unite(key, store.shard_counts(key.attack), look_up, self._images.labels, standing)


class Watched(nn.Module):
    """`network`, which raises Stopped between two calls when `should_stop` says so."""

    def __init__(self, network: nn.Module, should_stop: Callable[[], bool]) -> None:
        super().__init__()
        self.network, self._should_stop = network, should_stop

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        if self._should_stop():
            raise Stopped
        logits: Tensor = self.network(x)
        return logits


def _standing(before: Measurement) -> Tensor:
    return unpack_bits(before.robust_bits, before.images)


def _chain(name: str, stages: list[Measurement], labels: Tensor) -> Measurement:
    """Stages as one attack: the images robust after the last, total time, largest share of zero gradients."""
    shares = [stage.zero_grad_share for stage in stages if stage.zero_grad_share is not None]
    return Measurement.of(
        name,
        _standing(stages[-1]),
        labels,
        classes=int(labels.max()) + 1,
        seconds=sum(stage.seconds for stage in stages),
        batch_size=min(stage.batch_size for stage in stages),
        zero_grad_share=max(shares, default=None),
    )
