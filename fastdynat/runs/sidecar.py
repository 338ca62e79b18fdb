"""Sidecar of a weights file: the network, its training and the digest of the weights, as JSON beside them."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from fastdynat import __version__
from fastdynat.documents import DocumentError, check_text, read_json
from fastdynat.documents.files import MIB
from fastdynat.documents.numbers import Count, Finite, Radius, Share
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import write_text
from fastdynat.user_code import check_stored

FORMAT = "fastdynat-weights/1"
Side = Annotated[int, Meta(ge=1, le=4096)]  # pixels; what --image-size takes
Channels = Annotated[int, Meta(ge=1, le=64)]


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """`NAME.json` beside `NAME.safetensors`: the network and its training. eps in [0, 1] pixel units."""

    architecture: str
    num_classes: Annotated[int, Meta(ge=2, le=1_000_000)]
    image_shape: tuple[Channels, Side, Side]
    mean: tuple[Finite, ...] | None
    std: tuple[Finite, ...] | None
    dataset: str
    class_names: tuple[str, ...]
    role: str  # "model" or "guide"
    method: str
    norm: str
    eps: Radius
    eval_eps: Radius
    epoch: Count  # epochs completed
    val_clean_acc: Share | None
    val_pgd10_acc: Share | None
    eval_radii: dict[str, Radius] | None = None  # by norm, where the run trained against several
    test_origin: tuple[str, str] | None = None  # of `DatasetInfo`


@dataclass(frozen=True, kw_only=True)
class _Stored(Sidecar):
    """The document in the file."""

    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """The part that `completed_epochs` reads, also from a sidecar whose other values are damaged."""

    epoch: Count


def write_sidecar(path: Path, sidecar: Sidecar, digest: str) -> None:
    """Write the sidecar of the weights at `path`, whose sha256 is `digest`. Raises WriteError."""
    about = {
        "format": FORMAT,
        "fastdynat": __version__,
        "weights": path.name,
        "sha256": digest,
        **asdict(sidecar),
    }
    write_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")


def read_sidecar(path: Path | str) -> tuple[Sidecar, str]:
    """The sidecar of the weights at `path`, and the sha256 that it says they have.

    Raises:
        UserError: it is missing, not JSON, of another format, or has an impossible value; names it.
    """
    path = Path(path)
    sidecar = path.with_suffix(".json")
    stored = read_json(
        sidecar,
        _Stored,
        what="a fastdynat checkpoint",
        format=FORMAT,
        remedy="weights and the .json that was written with them belong together",
        limit=16 * MIB,
    )
    values = vars(stored).copy()
    promised = values.pop("sha256")
    if len(stored.class_names) != stored.num_classes:
        raise DocumentError(
            f"{sidecar}: num_classes is {stored.num_classes}, but class_names has {len(stored.class_names)}"
        )
    for name in (stored.architecture, stored.dataset, stored.method):
        check_text(name, f"{sidecar}: a name")
    check_stored(stored.architecture, str(sidecar))
    return Sidecar(**values), promised


def completed_epochs(checkpoint: Path) -> int:
    """Completed epochs of the checkpoint in a folder, by its model's sidecar; 0 where that is damaged."""
    with suppress(UserError):
        return read_json(checkpoint / "model.json", _Epoch, what="a sidecar").epoch
    return 0
