"""Export of a weights file instead of a run."""

from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from fastdynat.attack_engine.steps import diameter
from fastdynat.commands.evaluate.weights_files import is_described, weights_of_file
from fastdynat.commands.export.export_config import ExportConfig
from fastdynat.data import DatasetInfo, dataset_info
from fastdynat.errors import UserError
from fastdynat.models.initial_state import network_pixels
from fastdynat.runs import Sidecar, load_network, read_sidecar
from fastdynat.units import parse_size

FILE_OPTIONS = ("model", "normalize", "norm", "eps")
IMAGENET = DatasetInfo(
    name="imagenet",
    num_classes=1000,
    image_shape=(3, 224, 224),
    class_names=tuple(map(str, range(1000))),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augment="crop-flip",
)


def refuse_file_options(source: Path, config: ExportConfig) -> None:
    """Raise UserError for options that describe the network, which `source` does itself."""
    for field in fields(ExportConfig):
        if field.name in FILE_OPTIONS and getattr(config, field.name) != field.default:
            raise UserError(
                f"--{field.name} is for weights files without a description of their network; {source} has "
                "one: leave it out"
            )


def exported_file(file: Path, config: ExportConfig) -> tuple[nn.Module, Sidecar, str]:
    """The network with the weights in `file`, what is known about it, and the digest of its weights.

    Raises:
        UserError: --model or --dataset is missing or superfluous, or the weights do not fit.
    """
    if is_described(file) and config.model is None:
        refuse_file_options(file, config)
        network, sidecar = load_network(file)
        return network.requires_grad_(False), sidecar, read_sidecar(file)[1]
    if config.model is None:
        raise UserError(
            f"{file} does not name its network; give --model, for example --model wrn-28-10-silu-same"
        )
    if config.dataset == "auto":
        raise UserError(f"{file} does not name its data set; give --dataset, for example --dataset cifar10")
    info = IMAGENET if config.dataset == "imagenet" else dataset_info(config.dataset)
    if info is None:
        raise UserError(f"--dataset {config.dataset}: RobustBench has cifar10, cifar100 and imagenet")
    network, digest = weights_of_file(file, config.model, config.normalize, info)
    pixels = network_pixels(network)
    size = parse_size(config.eps, "eps", norm=config.norm, limit=diameter(config.norm, info.image_shape))
    about = Sidecar(
        architecture=config.model,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
        mean=None,
        std=None,
        dataset=info.name,
        class_names=info.class_names,
        role="model",
        method="",
        norm=config.norm,
        eps=size.value,
        eval_eps=size.value,
        epoch=0,
        val_clean_acc=None,
        val_pgd10_acc=None,
    )
    if pixels is not None:
        about = replace(about, mean=pixels[0], std=pixels[1])
    return network.requires_grad_(False), about, digest
