"""The flags of `fastdynat eval`, which need no torch; and shards of an evaluation."""

import re
from dataclasses import dataclass
from typing import Literal

from fastdynat.config import CompileMode, EvalAmp, Kernels
from fastdynat.config.train_checks import DATASETS, is_data_name
from fastdynat.config.value_ranges import check_radii, check_values
from fastdynat.errors import UserError, unknown_name


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate networks on the test set, in float32 unless told otherwise."""

    attacks: str = "clean,fgsm,pgd20,cw"
    """Comma-separated; --list-attacks prints every name; path/to/file.py:NAME is your own attack."""
    eps: float | str = "auto"
    """Radius: 8/255, 0.031, or 8 (read as 8/255); auto is the run's eval_eps, or 8/255 under linf for a model
    without one."""
    step_size: float | str = "auto"
    """Step size of attacks with a fixed step (pgd, cw); auto is eps / 4, or 10 eps under l0."""
    norm: Literal["auto", "linf", "l2", "l1", "l0"] = "auto"
    """Threat model; auto is the one the run was trained for, or linf for other models."""
    checkpoints: Literal["both", "best", "last"] = "both"
    """Checkpoints of a run to evaluate."""
    model: str | None = None
    """Network of the weights file that is evaluated: any name that train --model takes. Not needed for a file
    that fastdynat wrote, with its .json."""
    normalize: Literal["none", "dataset", "released"] = "none"
    """Mean/std layer in front of that network, as in train --normalize; a file that has its own mean and std
    keeps them."""
    weights: str | None = None
    """Weights file for a torchvision:NAME, file.py:callable or module:callable model."""
    source: str | None = None
    """Run directory (its best checkpoint), .safetensors file or model name on which the transfer-NAME attacks
    are made."""
    data: str = "auto"
    """Dataset; auto is the run's."""
    data_dir: str = "auto"
    """Folder of the dataset; auto is the run's."""
    image_size: int | None = None
    """Resize and centre-crop an image folder's images to this size; None is the run's."""
    num_images: int | None = None
    """Use only the first N test images (of an image folder, one from each class in turn)."""
    shard: str | None = None
    """I/N: evaluate only images I, I + N, I + 2 N, ... (counted from 1), for example in one process per GPU.
    When all N shards are done, the same command without --shard merges them."""
    batch_size: int = 500
    """Images per batch, which bounds memory use; halved if memory runs out. It affects the results
    only of autoattack and of attacks from your own files."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is a GPU if there is one."""
    amp: EvalAmp = "off"
    """Mixed precision of PGD-like attacks. The float32 network still judges the images they find. auto, or a
    bare --amp, is the fastest precision on this machine."""
    compile: CompileMode = "off"
    """torch.compile of the attack's gradients; auto, or a bare --compile, is default where that is faster."""
    kernels: Kernels = "auto"
    """Implementation of the fused operators; auto is FASTDYNAT_KERNELS if it is set, else the fastest
    that is correct on this machine."""
    seed: int = 1
    """Seed of the random numbers of each image."""
    cache: str = "auto"
    """Folder of cached results; auto is RUN/evaluations (./evaluations for other models), off disables the
    cache."""
    fresh: bool = False
    """Ignore cached results: measure again and replace them."""
    checks: bool = False
    """Look for signs of masked gradients afterwards, and suggest what to run next."""
    per_class: bool = False
    """Also print the accuracy of each class."""
    json: str | None = None
    """Also write the results to this file, after each attack."""
    rank_timeout: float = 10.0
    """With several processes (torchrun), time limit in minutes for every rank to join the rendezvous and each
    collective. When it expires, the error names the missing rank and all processes end."""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th image from image `index` on, which is in 1 .. count."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def rows(self) -> slice:
        """Of all images, those of the shard."""
        return slice(self.index - 1, None, self.count)


def parse_shard(text: str | None) -> Shard | None:
    """Read ``I/N``.

    Raises:
        UserError: anything else, or I outside 1 .. N.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard must be I/N with I from 1 to N, for example 1/4, got {text!r}")
    return Shard(int(match[1]), int(match[2]))


def check_eval_config(config: EvalConfig) -> None:
    """Raise UserError for a value that cannot work with any network, data or machine."""
    check_values(config)
    check_radii(config, config.norm)
    if config.data != "auto" and not is_data_name(config.data):
        raise unknown_name("dataset", config.data, DATASETS)
    parse_shard(config.shard)
