"""Weight files of a checkpoint: written from the networks of a run, and loaded back into them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.methods import method_label
from fastdynat.models.finite import check_finite
from fastdynat.models.initial_state import network_pixels
from fastdynat.runs import Sidecar, load_into, load_state, save_weights
from fastdynat.training.networks import NetworkSet, pixel_statistics
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.training_state import snapshot
from fastdynat.user_code import short_name, without_place


def _files(networks: NetworkSet, config: ResolvedConfig[Any]) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, network, architecture) of each file; model_raw is the trained one beside a weight average."""
    yield "model", networks.deployed(), config.model.model
    if networks.ema is not None:
        yield "model_raw", networks.raw["model"], config.model.model
    if "guide" in networks.raw:
        yield "guide", networks.raw["guide"], config.model.guide


@dataclass(frozen=True)
class WeightFile:
    """One file of a checkpoint, with copies of the network's tensors on the CPU."""

    name: str
    state: dict[str, Tensor]
    about: Sidecar


def weights_now(
    networks: NetworkSet,
    config: ResolvedConfig[Any],
    info: DatasetInfo,
    *,
    epoch: int,
    validated: Mapping[str, float],
) -> list[WeightFile]:
    """Copies of the networks of a run, ready to be written.

    Args:
        epoch: completed epochs.
        validated: val_clean_acc and val_pgd10_acc of the deployed network with these very weights, or empty.
    """
    files = []
    for name, network, architecture in _files(networks, config):
        role = "guide" if name == "guide" else "model"
        found = validated if name == "model" else {}
        about = describe_weights(
            config, info, role=role, architecture=architecture, epoch=epoch, validated=found
        )
        about = with_own_pixels(about, network)
        files.append(WeightFile(name, snapshot(network.state_dict()), about))
    return files


def write_weights(folder: Path, files: list[WeightFile]) -> None:
    """Write `files` into the checkpoint `folder`. Raises WriteError where the disk is full or fails."""
    for file in files:
        save_weights(folder / f"{file.name}.safetensors", file.state, file.about)


def describe_weights(
    config: ResolvedConfig[Any],
    info: DatasetInfo,
    *,
    role: str,
    architecture: str,
    epoch: int,
    validated: Mapping[str, float],
) -> Sidecar:
    """The sidecar of weights of a run. `role`: "model" or "guide"; the rest as for `weights_now`."""
    attack = config.attack
    mean, std = pixel_statistics(config.model, info)
    return Sidecar(
        architecture=architecture,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
        mean=mean,
        std=std,
        dataset=info.name,
        class_names=info.class_names,
        role=role,
        method=method_label(config.method),
        norm=attack.norm,
        eps=attack.eps,
        eval_eps=attack.eval_eps,
        eval_radii=None if attack.norms is None else attack.eval_radii(),
        epoch=epoch,
        val_clean_acc=validated.get("val_clean_acc"),
        val_pgd10_acc=validated.get("val_pgd10_acc"),
        test_origin=info.test_origin,
    )


def with_own_pixels(about: Sidecar, network: nn.Module) -> Sidecar:
    """`about` with the mean and standard deviation in `network`, which --init-from and --guide-from bring."""
    found = network_pixels(network)
    channels = about.image_shape[0]
    usual = torch.tensor([about.mean or (0.0,) * channels, about.std or (1.0,) * channels])
    if found is None or torch.equal(torch.tensor(found), usual):
        return about
    return replace(about, mean=found[0], std=found[1])


def load_weights(folder: Path, networks: NetworkSet, config: ResolvedConfig[Any]) -> None:
    """Load the files of `write_weights` into the networks.

    Raises:
        UserError: a file is missing, damaged, of another network or method, or holds NaN.
    """
    for name, network, architecture in _files(networks, config):
        file = folder / f"{name}.safetensors"
        state, sidecar = load_state(file)
        kept, own = without_place(sidecar.architecture), without_place(architecture)
        if (kept, sidecar.method) != (own, method_label(config.method)):
            found = f"{short_name(sidecar.architecture)} of {sidecar.method}"
            wanted = f"{short_name(architecture)} of {method_label(config.method)}"
            raise UserError(f"{file} is a {found}, this run's is a {wanted}")
        load_into(network, state, file, short_name(architecture))
        check_finite(network, file)
