"""The accuracies that a run's stored evaluations give to one checkpoint."""

from dataclasses import dataclass
from math import isclose
from pathlib import Path

from fastdynat.commands.evaluate.measurement_store import read_measurements
from fastdynat.evaluation import Measurement

PARTIAL = ("shard", "standing", "source")  # keys of parts of a measurement, and of transfer attacks


@dataclass(frozen=True)
class Accuracies:
    """Shares in [0, 1], None where nothing is stored; `note` says what they were measured on, or what to
    run.
    """

    clean: float | None
    autoattack: float | None
    note: str


def stored_accuracies(run: Path, weights: str, *, dataset: str, norm: str, eps: float) -> Accuracies:
    """Clean and AutoAttack accuracy of the checkpoint whose weights have the sha256 `weights`, at `eps` in
    `norm` on `dataset`.

    Only float32 counts; of several measurements the one on most images. The reference AutoAttack goes before
    ours.
    """
    found: dict[str, Measurement] = {}
    for key, about, measured in read_measurements(run):
        if (
            not {"norm", "eps", "dataset"} <= about.keys()
            or about["dataset"] != dataset
            or key.get("weights") != weights
            or key.get("amp") != "off"
            or any(key.get(part) is not None for part in PARTIAL)
        ):
            continue
        if key["attack"] != "clean" and (
            about["norm"] != norm or not isclose(about["eps"], eps, rel_tol=1e-6)
        ):
            continue
        if key["attack"] not in found or measured.images > found[key["attack"]].images:
            found[key["attack"]] = measured
    robust = next((name for name in ("autoattack", "fast-autoattack") if name in found), None)
    used = [name for name in ("clean", robust) if name is not None and name in found]
    note = "; ".join(
        f"{name}: {100 * found[name].accuracy:.2f} % of {found[name].images} images" for name in used if name
    )
    if robust is None or "clean" not in found:
        note += (
            f"{'; ' if note else ''}the rest is null until: fastdynat eval {run} --attacks clean,autoattack"
        )
    clean, autoattack = (found[name].accuracy if name in found else None for name in ("clean", robust or ""))
    return Accuracies(clean, autoattack, note)
