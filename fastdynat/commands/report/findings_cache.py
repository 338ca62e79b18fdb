"""findings.json: what was computed for a report, by all that it depends on."""

import base64
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from PIL import Image

from fastdynat.commands.report.findings import LARGEST
from fastdynat.documents import DocumentError, convert, read_json
from fastdynat.documents.numbers import Count, Finite, Share
from fastdynat.errors import first_line
from fastdynat.evaluation import Measurement
from fastdynat.evaluation.curves import EpsCurve
from fastdynat.evaluation.masking import MaskingReport
from fastdynat.evaluation.transfer import TransferMatrix
from fastdynat.runs.atomic_files import write_text

FORMAT = "fastdynat-findings/1"


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """PNG files in base64 (`findings.PICTURES`)."""

    image: str
    perturbation: str
    adversarial: str
    saliency: str
    smooth_grad: str


@dataclass(frozen=True, kw_only=True)
class _Example:
    """One attacked image."""

    label: str
    before: tuple[str, Share]
    after: tuple[str, Share]
    pictures: _Pictures


@dataclass(frozen=True, kw_only=True)
class _Examples:
    """`findings.examples`."""

    gain: Finite
    explained: Count
    edge_alignment: float | None
    smooth_edge_alignment: float | None
    concentration: float | None
    examples: Annotated[list[_Example], Meta(min_length=1, max_length=64)]


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """One entry of the file."""

    key: dict[str, Any]
    value: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The file as a whole."""

    findings: list[_Finding]


SCHEMAS: dict[Any, Any] = {
    "curve": EpsCurve,
    "nearest": Measurement,
    "examples": _Examples,
    "masking": MaskingReport,
    "transfer": TransferMatrix,
}


def _check_finding(found: Any, path: Path, remedy: str) -> None:
    """Raise DocumentError where the parts of a finding do not fit each other."""
    if isinstance(found, Measurement):
        found.check(str(path))
    elif isinstance(found, EpsCurve) and not len(found.eps) == len(found.accuracy) == len(found.ci) > 0:
        raise DocumentError(f"{path}: a curve's radii and accuracies are not as many; {remedy}")
    elif isinstance(found, TransferMatrix) and {
        len(found.clean),
        len(found.accuracy),
        *map(len, found.accuracy),
    } != {len(found.names)}:
        raise DocumentError(f"{path}: a transfer matrix is not square; {remedy}")
    elif isinstance(found, _Examples):
        for example in found.examples:
            for kind, data in vars(example.pictures).items():
                _check_picture(data, f"{path}: the picture {kind}", remedy)


def _check_picture(data: str, what: str, remedy: str) -> None:
    """Raise DocumentError unless `data` is a small PNG in base64 that can be decoded."""
    try:
        with Image.open(BytesIO(base64.b64decode(data, validate=True)), formats=("PNG",)) as image:
            small = max(image.size) <= LARGEST
            if small:
                image.load()
    except Exception as error:  # decoders raise many kinds on damaged files
        raise DocumentError(f"{what} is damaged ({first_line(error)}); {remedy}") from None
    if not small:
        raise DocumentError(
            f"{what} has {image.size[0]}x{image.size[1]} pixels, not at most {LARGEST}; {remedy}"
        )


class Cache:
    """Findings by key; the file is whole at every moment.

    Raises:
        UserError: the file is damaged or another program's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        remedy = "remove it to compute its findings again"
        stored = read_json(path, _Stored, what="a report's findings", format=FORMAT, remedy=remedy)
        for finding in stored.findings:
            kind = finding.key.get("kind")
            if kind in SCHEMAS:
                why = f"it was damaged or edited; {remedy}"
                checked = convert(finding.value, SCHEMAS[kind], origin=f"{path}, {kind}", why=why)
                _check_finding(checked, path, remedy)
            self._entries[self._name(finding.key)] = {"key": finding.key, "value": finding.value}

    @staticmethod
    def _name(key: dict[str, Any]) -> str:
        return json.dumps(key, sort_keys=True)

    def get(self, key: dict[str, Any]) -> Any:
        """The finding under `key`; None where there is none."""
        entry = self._entries.get(self._name(key))
        return None if entry is None else entry["value"]

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Store a finding, on disk too."""
        self._entries[self._name(key)] = {"key": key, "value": value}
        write_text(self.path, json.dumps({"format": FORMAT, "findings": list(self._entries.values())}) + "\n")
