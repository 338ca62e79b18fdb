"""Pretrained networks of RobustBench, torchvision and timm, behind the normalisation that they expect."""

import importlib
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torchvision
from torch import nn

from fastdynat.errors import UserError, unknown_name
from fastdynat.models.build import Normalize
from fastdynat.models.external import require_timm, require_torchvision, unknown_of_many
from fastdynat.models.state_files import put_published_state, read_state_dict
from fastdynat.user_code import error_with_place


def torchvision_pretrained(name: str) -> tuple[nn.Module, str]:
    """torchvision's classifier `name` with its default weights, and a note on its normalisation."""
    name = name.lower()
    require_torchvision(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    net = downloaded(f"torchvision:{name}", lambda: torchvision.models.get_model(name, weights=weights))
    transforms = weights.transforms()
    return _normalised(net, transforms.mean, transforms.std, f"weights {weights}")


def timm_pretrained(name: str, *, image_size: tuple[int, int] | None = None) -> tuple[nn.Module, str]:
    """timm's model `name`, by its weights' tag or the default one, and a note on its normalisation.

    image_size: (H, W) to which timm resamples embeddings of positions; None keeps the weights' own.
    """
    timm = require_timm(name)

    def load() -> Any:
        if image_size is not None:
            try:
                return timm.create_model(name, pretrained=True, img_size=image_size)
            except TypeError as error:  # convolutional networks have no fixed size
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, pretrained=True)

    net = downloaded(f"timm:{name}", load)
    config = net.pretrained_cfg
    return _normalised(
        net, config["mean"], config["std"], f"weights {config['architecture']}.{config['tag']}"
    )


def robustbench(rest: str, weights: Path | None) -> tuple[nn.Module, str]:
    """RobustBench's model NAME[:DATASET[:THREAT]] (cifar10, Linf), with its weights or the file `weights`.

    Raises: UserError where robustbench is not installed, has no such model, or cannot download it.
    """
    name, dataset, threat = (rest.split(":") + ["cifar10", "Linf"][rest.count(":") :])[:3]
    if rest.count(":") > 2:
        raise UserError(f"robustbench:{rest}: the form is robustbench:NAME[:DATASET[:THREAT]]")
    if importlib.util.find_spec("robustbench") is None:
        raise UserError(
            f"robustbench:{rest} needs robustbench, which is not installed: pip install robustbench"
        )
    zoo, utils = _import_robustbench()
    models = zoo.model_dicts
    for key, kind in ((dataset, "data set"), (threat, "threat model")):
        known = {member.value: member for member in models}
        if key not in known:
            raise unknown_name(f"RobustBench {kind}", key, known)
        models = models[known[key]]
    if name not in models:
        raise unknown_of_many(
            f"RobustBench model for {dataset}, {threat}", name, list(models), "its leaderboard"
        )
    if weights is not None:
        return put_published_state(models[name]["model"](), read_state_dict(weights), weights), ""
    options = {"dataset": dataset, "threat_model": threat}
    return downloaded(
        f"robustbench:{rest}", lambda: utils.load_model(name, **options)
    ), "weights of its zoo, kept in ./models"


def _import_robustbench() -> tuple[Any, Any]:
    try:
        with _autoattack_by_its_name_on_pypi(), _pkg_resources():
            return importlib.import_module("robustbench.model_zoo"), importlib.import_module(
                "robustbench.utils"
            )
    except Exception as error:
        raise UserError(
            f"robustbench is installed but cannot be imported: {error_with_place(error)}"
        ) from error


@contextmanager
def _autoattack_by_its_name_on_pypi() -> Iterator[None]:
    """Lend robustbench `pyautoattack`, which it requires on PyPI, under the name `autoattack` it imports."""
    lent = {"autoattack": "pyautoattack", "autoattack.state": "pyautoattack.state"}
    if importlib.util.find_spec("autoattack") or not importlib.util.find_spec("pyautoattack"):
        lent = {}
    try:
        sys.modules.update({name: importlib.import_module(real) for name, real in lent.items()})
        yield
    finally:
        for name in lent:
            sys.modules.pop(name, None)


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """Lend robustbench `pkg_resources.resource_filename`, which setuptools 82 no longer has."""
    name = "pkg_resources"
    if importlib.util.find_spec(name):
        yield
        return
    lent = ModuleType(name)
    lent.resource_filename = _resource_filename  # type: ignore[attr-defined]
    sys.modules[name] = lent
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def _resource_filename(module: str, resource: str) -> str:
    """The path of a file beside an imported module."""
    return str(Path(str(sys.modules[module].__file__)).parent / resource)


def downloaded(
    name: str,
    load: Callable[[], Any],
    *,
    remedy: str = "or give their file: eval --weights FILE, train --init-from FILE",
) -> Any:
    """The result of `load`; a failed download, whatever its exception, becomes a UserError."""
    try:
        return load()
    except Exception as error:
        needs = f"its weights are downloaded once, which needs a network; {remedy}"
        raise UserError(f"cannot load {name}: {needs} ({error_with_place(error)})") from error


def _normalised(
    net: nn.Module, mean: Sequence[float], std: Sequence[float], note: str
) -> tuple[nn.Module, str]:
    model = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net))
    return model, f"{note}; their normalisation is in front: mean {tuple(mean)}, std {tuple(std)}"
