"""The targets of an evaluation: checkpoints of runs and other models, each with its images and attacks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat import __version__
from fastdynat.attack_engine.steps import diameter, usual_step
from fastdynat.commands.evaluate.columns import AttackColumn, check_target_classes, parse_columns
from fastdynat.commands.evaluate.measurement_store import FOLDER
from fastdynat.commands.evaluate.settle import EvalConfig, Shard, parse_shard
from fastdynat.commands.evaluate.weights_files import (
    check_weights_file,
    described_weights,
    is_weights_file,
    weights_of_file,
)
from fastdynat.config import DataConfig, read_config_file
from fastdynat.data import DatasetInfo, Images, load_test
from fastdynat.data.read_ahead import pixel_digest
from fastdynat.errors import UserError
from fastdynat.evaluation.masking import radius_of_grey
from fastdynat.runs import (
    BEST,
    CONFIG,
    LAST,
    Sidecar,
    check_test_images,
    data_difference,
    find_checkpoint,
    guide_weights,
    load_checkpoint,
    load_network,
    read_sidecar,
    require_run,
)
from fastdynat.runs.layout import real
from fastdynat.units import check_step_width, parse_size
from fastdynat.user_code import check_stored, short_name

logger = logging.getLogger(__name__)

TestSets = dict[tuple[str, str, int | None], tuple[DatasetInfo, Images]]  # by data, folder and image size
DEFAULT_EPS = 8 / 255  # of a model that we did not train, under L-inf


@dataclass(frozen=True)
class Radius:
    """The threat model of a target: norm, and sizes in [0, 1] pixel units."""

    norm: str
    eps: float
    step_size: float


@dataclass(frozen=True)
class Source:
    """The network that transfer attacks are made on, and the sha256 of its weights."""

    network: nn.Module
    weights: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """One network with what it is measured on.

    Attributes:
        name: the run directory or the model's name.
        checkpoint: best or last; None for a foreign model.
        weights: their sha256.
        trained: what is known about its training: method, architecture, dataset, epoch.
        everything: all test images; `images` is the share of them that is measured.
        digest: of all test images.
        folder: where its results are kept; None is nowhere.
    """

    name: str
    checkpoint: str | None
    weights: str
    network: nn.Module
    trained: dict[str, Any]
    columns: list[AttackColumn]
    radius: Radius
    info: DatasetInfo
    everything: Images
    shard: Shard | None
    digest: str
    folder: Path | None
    source: Source | None

    @property
    def title(self) -> str:
        return self.name if self.checkpoint is None else f"{self.name} {self.checkpoint}"

    @property
    def images(self) -> Images:
        return self.everything if self.shard is None else self.everything.part(self.shard.rows)

    @property
    def numbers(self) -> Tensor:
        """(N,) int64: the numbers of `images` among all test images."""
        return torch.arange(len(self.everything))[slice(None) if self.shard is None else self.shard.rows]

    @property
    def about(self) -> dict[str, Any]:
        """The values stored beside each measurement."""
        sizes = {"norm": self.radius.norm, "eps": self.radius.eps, "step_size": self.radius.step_size}
        origin = {"run": self.name, "checkpoint": self.checkpoint, "dataset": self.info.name}
        return {**origin, **sizes, "images": len(self.images), "fastdynat": __version__}


def check_names(names: Sequence[str | Path], config: EvalConfig) -> None:
    """Refuse what cannot be evaluated by its name alone, before anything is measured or loaded.

    Raises:
        UserError: no run there, a model without --data, or --weights where there is no model to take them.
    """
    if config.weights is not None and not any(_is_model(str(name)) for name in names):
        raise UserError(
            f"--weights {config.weights} is for models such as torchvision:NAME or module:callable; "
            f"{names[0]} is a "
            "run, which brings its own: leave --weights out"
        )
    if config.model is not None and not any(map(is_weights_file, names)):
        raise UserError(f"--model {config.model} is for weights files, which {names[0]} is not; leave it out")
    if config.model is None and config.normalize != "none":
        raise UserError(
            f"--normalize {config.normalize} is for a weights file given with --model; leave it out"
        )
    for name in names:
        if is_weights_file(name):
            check_weights_file(Path(name), config)
        elif not _is_model(str(name)):
            require_run(name)
        elif config.data == "auto":
            raise UserError(f"{name} comes without data: give --data, for example --data cifar10")


@dataclass(frozen=True)
class MeasuredImages:
    """The images of a test set that are measured, and their `pixel_digest`."""

    info: DatasetInfo
    images: Images
    digest: str


class Planner:
    """Loads and checks everything that one evaluation needs, each test set once."""

    def __init__(self, config: EvalConfig, tests: TestSets) -> None:
        self.config, self.tests = config, tests
        self.shard = parse_shard(config.shard)
        self._sources: dict[DatasetInfo, Source] = {}
        self._measured: dict[tuple[str, str, int | None], MeasuredImages] = {}

    def plan(self, names: Sequence[str | Path]) -> list[Target]:
        """The targets called `names`: an existing path is a run, another name with a colon a model."""
        targets = []
        check_names(names, self.config)
        for name in names:
            if is_weights_file(name):
                targets.append(self._file(Path(name)))
            elif _is_model(str(name)):
                targets.append(self._model(str(name)))
            else:
                targets += self._run(Path(name))
        self._check_source(targets)
        return targets

    def _run(self, path: Path) -> list[Target]:
        config = self.config
        stored = read_config_file(path / CONFIG)
        if not isinstance(stored.get("data"), str) or not isinstance(stored.get("data_dir"), str):
            raise UserError(f"{path / CONFIG} names no data and data_dir: it was damaged or edited")
        data = check_stored(stored["data"], str(path / CONFIG)) if config.data == "auto" else config.data
        # Another dataset is not looked for, nor downloaded, where the run's own lies.
        folder = stored["data_dir"] if data == stored["data"] else DataConfig().data_dir
        size = stored.get("image_size") if config.image_size is None else config.image_size
        checkpoints = (BEST, LAST) if config.checkpoints == "both" else (config.checkpoints,)
        loaded = [(checkpoint, *_load(path, checkpoint)) for checkpoint in checkpoints]
        kept = self._kept(path)
        targets = []
        for checkpoint, network, sidecar, weights in loaded:
            test = self._test_set(data, folder, size, download=bool(stored.get("download", True)))
            if difference := data_difference(sidecar, test.info):
                raise UserError(f"{path} was trained on {difference}")
            check_test_images(sidecar, test.info, str(path))
            trained = {key: getattr(sidecar, key) for key in ("method", "architecture", "dataset", "epoch")}
            trained["architecture"] = short_name(sidecar.architecture)
            for radius in self._radii(str(path), test.info, sidecar):
                targets.append(
                    self._target(str(path), checkpoint, weights, network, trained, radius, test, kept)
                )
        return targets

    def _radii(self, name: str, info: DatasetInfo, sidecar: Sidecar) -> list[Radius]:
        """The threat models of the run called `name`: all that it was trained for, unless --norm is one."""
        config, radii = self.config, sidecar.eval_radii or {sidecar.norm: sidecar.eval_eps}
        if config.norm != "auto":
            norm = config.norm if config.norm in radii else sidecar.norm
            return [self._radius(info, norm, radii[norm])]
        for flag, value in (("--eps", config.eps), ("--step-size", config.step_size)):
            if len(radii) > 1 and value != "auto":
                raise UserError(
                    f"{flag} {value}: {name} was trained against {', '.join(radii)}; say which with --norm"
                )
        return [self._radius(info, norm, eps) for norm, eps in radii.items()]

    def _kept(self, run: Path) -> Path | None:
        """The folder for the results of `run`; None where it is a symbolic link out of the run."""
        folder = run / FOLDER
        if not folder.is_symlink() or real(folder).is_relative_to(real(run)):
            return folder
        if self.config.cache == "auto":
            logger.warning(
                "results are not kept: %s is a symbolic link out of the run; use --cache DIR", folder
            )
        return None

    def _model(self, name: str) -> Target:
        test = self._test_set(self.config.data, DataConfig().data_dir, self.config.image_size, download=True)
        info = test.info
        network, weights = _load_foreign(name, info, self.config.weights)
        trained = {"method": None, "architecture": name, "dataset": info.name, "epoch": None}
        radius = self._default_radius(name, info)
        return self._target(name, None, weights, network, trained, radius, test, Path(FOLDER))

    def _default_radius(self, name: str, info: DatasetInfo) -> Radius:
        """The radius of a network that nothing says what it was trained for."""
        if self.config.eps == "auto" and self.config.norm in ("auto", "linf"):
            logger.info("%s: no --eps given; using 8/255 under linf", name)
        return self._radius(info, "linf", DEFAULT_EPS)

    def _file(self, file: Path) -> Target:
        config = self.config
        about = described_weights(file, config)
        data = config.data if about is None or config.data != "auto" else about.dataset
        test = self._test_set(data, DataConfig().data_dir, config.image_size, download=True)
        info = test.info
        if about is None:
            assert config.model is not None
            network, weights = weights_of_file(file, config.model, config.normalize, info)
            trained = {"method": None, "architecture": config.model, "dataset": info.name, "epoch": None}
            radius = self._default_radius(str(file), info)
        else:
            network, _ = load_network(file)
            weights = read_sidecar(file)[1]
            if difference := data_difference(about, info):
                raise UserError(f"{file} was trained on {difference}")
            check_test_images(about, info, str(file))
            trained = {key: getattr(about, key) for key in ("method", "architecture", "dataset", "epoch")}
            trained["architecture"] = short_name(about.architecture)
            radius = self._radius(info, about.norm, about.eval_eps)
        return self._target(str(file), None, weights, network, trained, radius, test, Path(FOLDER))

    def _target(
        self,
        name: str,
        checkpoint: str | None,
        weights: str,
        network: nn.Module,
        trained: dict[str, Any],
        radius: Radius,
        test: MeasuredImages,
        folder: Path | None,
    ) -> Target:
        config, info, images = self.config, test.info, test.images
        if config.checks:
            radius_of_grey(radius.norm, images)  # refuses norms that the checks, which come last, do not know
        columns = parse_columns(
            config.attacks, eps=radius.eps, step_size=radius.step_size, norm=radius.norm, amp=config.amp
        )
        check_target_classes(columns, info.num_classes)
        if self.shard is not None and self.shard.count > len(images):
            raise UserError(
                f"--shard {self.shard} of {len(images)} images leaves some shards empty; use fewer shards"
            )
        return Target(
            name=name,
            checkpoint=checkpoint,
            weights=weights,
            network=network.eval(),
            trained=trained,
            columns=columns,
            radius=radius,
            info=info,
            everything=images,
            shard=self.shard,
            digest=test.digest,
            folder={"auto": folder, "off": None}.get(config.cache, Path(config.cache)),
            source=self._source(info) if config.source is not None else None,
        )

    def _radius(self, info: DatasetInfo, norm: str, eps: float) -> Radius:
        """norm, eps: what "auto" stands for."""
        config = self.config
        if config.norm not in ("auto", norm) and config.eps == "auto":
            raise UserError(
                f"a radius under {norm} does not apply to {config.norm}: --norm {config.norm} needs --eps"
            )
        norm = norm if config.norm == "auto" else config.norm
        limit = diameter(norm, info.image_shape)
        values = [eps, None]
        for i, (what, text) in enumerate((("eps", config.eps), ("step_size", config.step_size))):
            if text != "auto":
                size = parse_size(text, what, norm=norm, limit=limit)
                values[i] = size.value
                if size.notice:
                    logger.info(size.notice)
        assert values[0] is not None
        radius = Radius(norm, values[0], usual_step(norm, values[0]) if values[1] is None else values[1])
        if norm == "linf":
            wide = check_step_width(
                config.step_size, config.eps, step_size=radius.step_size, radius=radius.eps
            )
            if wide is not None:
                logger.info(wide)
        return radius

    def _test_set(self, data: str, folder: str, size: int | None, *, download: bool) -> MeasuredImages:
        folder = folder if self.config.data_dir == "auto" else self.config.data_dir
        key = (data, folder, size)
        if key not in self.tests:
            self.tests[key] = load_test(data, folder, image_size=size, download=download)
        if key not in self._measured:
            info, images = self.tests[key]
            images = images.part(slice(self.config.num_images))
            self._measured[key] = MeasuredImages(info, images, pixel_digest(images))
        return self._measured[key]

    def _source(self, info: DatasetInfo) -> Source:
        name = self.config.source
        assert name is not None
        if info not in self._sources:
            self._sources[info] = _load_source(name, info)
        return self._sources[info]

    def _check_source(self, targets: list[Target]) -> None:
        transfers = [column.name for target in targets for column in target.columns if column.transfer]
        if transfers and self.config.source is None:
            raise UserError(f"{transfers[0]} needs a network to be made on: give --source RUN")
        if self.config.source is not None and not transfers and not self.config.checks:
            raise UserError(
                "--source is for attacks called transfer-NAME, such as --attacks transfer-pgd20, and --checks"
            )


def _load(run: Path, checkpoint: str) -> tuple[nn.Module, Sidecar, str]:
    """The network of a checkpoint, its sidecar and the sha256 of its weights."""
    if find_checkpoint(run, checkpoint) is None:
        hint = "; use --checkpoints last" if checkpoint == BEST and find_checkpoint(run, LAST) else ""
        raise UserError(f"{run} has no {checkpoint} checkpoint: no epoch of it was validated yet{hint}")
    return load_checkpoint(run, checkpoint)


def _load_foreign(name: str, info: DatasetInfo, weights: str | None) -> tuple[nn.Module, str]:
    """A model that we did not train and the sha256 of its weights."""
    from fastdynat.models.foreign import load_foreign

    file = None if weights is None else Path(weights)
    found = load_foreign(name, num_classes=info.num_classes, image_shape=info.image_shape, weights=file)
    if found.note:
        logger.info("%s: %s", name, found.note)
    return found.model, found.sha256


def _load_source(name: str, info: DatasetInfo) -> Source:
    if _is_model(name):
        network, sha256 = _load_foreign(name, info, None)
        return Source(network.eval(), sha256)
    path = guide_weights(Path(name))
    network, sidecar = load_network(path)
    if difference := data_difference(sidecar, info):
        raise UserError(f"--source {name} was trained on {difference}")
    return Source(network, read_sidecar(path)[1])


def _is_model(name: str) -> bool:
    """True where `name` means a model that was not trained here, rather than a path."""
    return ":" in name and not Path(name).exists()
