"""The subject of `fastdynat.evaluate`: a network, its images, and the threat model of its run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastdynat.api.trained_run import TrainedRun
from fastdynat.attack_engine.steps import diameter
from fastdynat.commands.evaluate.targets import DEFAULT_EPS
from fastdynat.config import read_config_file
from fastdynat.data import DatasetInfo, Images, load_test
from fastdynat.data.own_data import own_parts
from fastdynat.errors import UserError
from fastdynat.models.foreign import load_foreign
from fastdynat.models.logits import Output, with_output
from fastdynat.models.own_networks import count_logits
from fastdynat.runs import CONFIG, Sidecar, check_test_images, data_difference, load_network, looks_like_run


@dataclass(frozen=True)
class Subject:
    """The subject of an evaluation.

    Attributes:
        name: run directory, class or name of the model.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        about: what its run stored about it; None for a network that is of no run.
        info: of the images, with K classes.
        images: the test images.
    """

    name: str
    network: nn.Module
    about: Sidecar | None
    info: DatasetInfo
    images: Images


def open_subject(model: object, data: Any, data_dir: str, output: Output | None = None) -> Subject:
    """The network that `model` is or names, and the test images that `data` holds or names.

    output: selects the logits of a module (`with_output`).

    Raises:
        UserError: an argument of another kind, or images that are not like those of the network's run.
    """
    if output is not None and not isinstance(model, nn.Module):
        raise UserError(
            f"output={output!r} selects the logits of a torch.nn.Module; a run or a network given by name "
            "returns logits alone: leave output out"
        )
    run = _of_run(model)
    if run is None:
        info, images = _images(data, data_dir, None)
        network, name = _network(model, info, output)
        return Subject(name, network, None, _with_logits(info, network, name), images)
    if data is None and isinstance(model, TrainedRun):
        stored = model.config.data
        info, images = load_test(
            stored.data, stored.data_dir, image_size=stored.image_size, download=stored.download
        )
    else:
        info, images = _images(data, data_dir, run.image_size)
    _check_like(run, data, info)
    return Subject(run.name, run.network, run.about, _with_logits(info, run.network, run.name), images)


def threat_model(subject: Subject, norm: str | None, eps: float | None) -> tuple[str, float]:
    """Norm and radius; None is what the run of `subject` was trained for, or 8/255 under linf.

    Raises:
        UserError: a radius outside the norm's range, or one that neither is given nor follows from the run.
    """
    about = subject.about
    radii = {"linf": DEFAULT_EPS} if about is None else about.eval_radii or {about.norm: about.eval_eps}
    if norm is None:
        norm, *others = radii
        if others:
            raise UserError(
                f"{subject.name} was trained against {', '.join(radii)}; say which, such as norm={norm!r}"
            )
    if eps is None:
        if norm not in radii:
            raise UserError(
                f"a radius under {' or '.join(radii)} does not apply to {norm}: norm={norm!r} needs eps"
            )
        eps = radii[norm]
    if not 0 <= eps <= diameter(norm, subject.info.image_shape):
        raise UserError(f"eps must be a {norm} radius in [0, 1] pixel units, such as 8 / 255, got {eps:g}")
    return norm, eps


@dataclass(frozen=True)
class _Run:
    """The network of a run, what its weights' file says, and the size its images were brought to, if any."""

    name: str
    network: nn.Module
    about: Sidecar
    image_size: int | None


def _of_run(model: object) -> _Run | None:
    if isinstance(model, TrainedRun):
        return _Run(str(model.run_dir), model.model, model.about, model.config.data.image_size)
    if isinstance(model, str | Path) and looks_like_run(model):
        size = read_config_file(Path(model) / CONFIG).get("image_size")
        return _Run(str(model), *load_network(model), size)
    return None


def _check_like(run: _Run, data: Any, info: DatasetInfo) -> None:
    """Refuse images of another size than those of `run`, and other class names where `data` has names."""
    named = data is None or isinstance(data, str) or (isinstance(data, Mapping) and "classes" in data)
    ours = info if named else replace(info, class_names=run.about.class_names)
    if difference := data_difference(run.about, ours):
        raise UserError(f"{run.name} was trained on {difference}")
    check_test_images(run.about, info, run.name)


def _images(data: Any, data_dir: str, image_size: int | None) -> tuple[DatasetInfo, Images]:
    """The test images, and what is known about them; those of a named data set in the size `image_size`."""
    if data is None:
        raise UserError(
            "fastdynat.evaluate needs data: (images, labels), a Dataset or the name of a data set"
        )
    if isinstance(data, str):
        return load_test(data, data_dir, image_size=image_size)
    own = own_parts(data, "data")
    if isinstance(data, Mapping) and own.test is None:
        raise UserError("data: no 'test' in the dict; for other images give (images, labels)")
    return own.info, own.train if own.test is None else own.test


def _with_logits(info: DatasetInfo, network: nn.Module, name: str) -> DatasetInfo:
    """`info` of as many classes as there are logits: some images need not have all of them."""
    logits = count_logits(network, name, info.image_shape)
    if info.num_classes > logits:
        raise UserError(
            f"{info.name} has labels 0 to {info.num_classes - 1}, but the network only {logits} logits: it "
            "was made for other data"
        )
    names = (*info.class_names, *map(str, range(info.num_classes, logits)))
    return replace(info, num_classes=logits, class_names=names)


def _network(model: object, info: DatasetInfo, output: Output | None) -> tuple[nn.Module, str]:
    if isinstance(model, nn.Module):
        return with_output(model, output), type(model).__name__
    if not isinstance(model, str | Path):
        raise UserError(f"model must be a torch.nn.Module, a run or a name, got a {type(model).__name__}")
    name = str(model)
    return load_foreign(name, num_classes=info.num_classes, image_shape=info.image_shape).model, name
