"""Tables of the study of DYNAT's claim, with the runs that there are."""

import math
from collections.abc import Callable
from statistics import fmean, stdev

from tables import Values, percent, read, table

STORED = "dynat_claim_cpu"
ARMS = {
    "madry": "Madry",
    "dynat": "DYNAT",
    "trades": "TRADES",
    "lbgat": "LBGAT",
    "madry-seconds": "Madry, DYNAT's seconds",
    "dynamic-update": "dynamic label in the update only",
    "dynamic-attack": "dynamic label in the attack only",
    "true-labels": "true labels in both",
    "beta-0.2": "DYNAT, beta 0.2",
    "soft-labels": "DYNAT, soft labels",
    "no-inner": "DYNAT, attack on its own prediction",
    "large-guide": "DYNAT, guide of 0.95 M parameters",
    "guide": "guide alone, natural training",
    "guide-before": "DYNAT, pretrained guide",
}
CHECKPOINTS = ("best", "last")


def groups() -> dict[tuple[str, str], list[Values]]:
    """The finished runs by block and arm."""
    found: dict[tuple[str, str], list[Values]] = {}
    for run in read(STORED)["runs"].values():
        found.setdefault((run["block"], run["arm"]), []).append(run)
    return found


def mean(runs: list[Values], value: Callable[[Values], float]) -> str:
    """The mean over `runs`, in %."""
    return percent(fmean(map(value, runs)))


def at(checkpoint: str, attack: str, part: str = "test") -> Callable[[Values], float]:
    """Reads the accuracy of a run."""
    return lambda run: float(run[part][checkpoint][attack]["accuracy"])


def progress() -> str:
    """How many of the planned runs there are, and how far the one goes that is not finished."""
    values, found = read(STORED), groups()
    rows = []
    for block, count in values["planned"].items():
        finished = [run for (own, _), runs in found.items() if own == block for run in runs]
        if block == "autoattack":
            finished = [run for run in values["runs"].values() if "robust" in run]
        rows.append([block, f"{len(finished)} of {count}"])
    total = sum(count for block, count in values["planned"].items() if block != "autoattack")
    head = [f"**{len(values['runs'])} of {total} runs so far.**"]
    for name, epochs in values["begun"].items():
        head.append(f"In progress: `{name}`, {epochs} epochs done.")
    return f"{' '.join(head)}\n\n{table(['Block', 'Finished'], rows)}"


def accuracies() -> str:
    """Accuracies on the test images, means over the finished seeds."""
    rows = []
    for (block, arm), runs in groups().items():
        gap = 100 * fmean(at("best", "pgd20")(run) - at("last", "pgd20")(run) for run in runs)
        shares = [mean(runs, at(role, name)) for name in ("clean", "pgd20") for role in CHECKPOINTS]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        epochs = "/".join(str(epoch) for epoch in sorted({run["epochs"] for run in runs}))
        rows.append([block, ARMS[arm], seeds, epochs, *shares, f"{gap:.1f}", minutes(runs)])
    header = ["Block", "Arm", "Seeds", "Epochs", "Clean, best", "last", "PGD-20, best", "last", "Gap"]
    return table([*header, "CPU minutes"], rows) if rows else "No run is finished yet."


def minutes(runs: list[Values]) -> str:
    """Mean processor minutes of a training; a dash where a killed part went unmeasured."""
    known = [run["processor_seconds"] for run in runs if run["processor_seconds"] is not None]
    return f"{fmean(known) / 60:.1f}" if known else "-"


def findings() -> str:
    """What is said about each hypothesis, and what is only described."""
    values = read(STORED)
    rows = [[found["name"], *finding(found), p_of_seeds(found)] for found in values["findings"]]
    header = ["", "Contrast, crops and flips", "Points", "95 % interval", "Each seed", "p (Holm)", "Verdict"]
    return table([*header, "p (t-test)"], rows)


def without_augmentation() -> str:
    """The same contrasts of the block without augmentation."""
    names = ("H1-best", "H1-last", "H2", "gap-madry", "gap-dynat")
    chosen = [found for found in read(STORED)["without_augmentation"] if found["name"] in names]
    return contrasts("Contrast, no augmentation", chosen)


def follow_up() -> str:
    """Accuracies and contrasts of the runs that the results asked for."""
    values = read(STORED).get("follow_up", {"runs": {}, "findings": []})
    runs = [*values["runs"].values()]
    if not runs:
        return "Not run yet."
    found = [mean(runs, at(role, name)) for name in ("clean", "pgd20") for role in CHECKPOINTS]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    head = ["True labels in both, no augmentation: seeds", "Clean, best", "last", "PGD-20, best", "last"]
    shown = contrasts("Contrast, no augmentation", values["findings"])
    return f"{table(head, [[seeds, *found]])}\n\n{shown}"


def contrasts(head: str, found: list[Values]) -> str:
    """Contrasts that the plan does not test."""
    rows = [[*finding(one)[:4], p_of_seeds(one)] for one in found]
    return table([head, "Points", "95 % interval", "Each seed", "p (t-test)"], rows)


def finding(found: Values) -> list[str]:
    """Contrast, points, interval, seeds, p and verdict."""
    estimate = found["estimate"]
    if estimate is None:
        return [found["text"], f"{found['seeds']} of 3 seeds", "", "", "", found["verdict"]]
    low, high = estimate["ci"]
    seeds = ", ".join(f"{value:+.1f}" for value in estimate["seeds"])
    p = "" if found["adjusted_p"] is None else f"{found['adjusted_p']:.3g}"
    return [
        found["text"],
        f"{estimate['mean']:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        seeds,
        p,
        found["verdict"],
    ]


def p_of_seeds(found: Values) -> str:
    """Two-sided p of a t-test on the differences of three seeds, which has 2 degrees of freedom."""
    seeds = found["estimate"]["seeds"] if found["estimate"] else ()
    if len(seeds) != 3:
        return ""
    error = stdev(seeds) / math.sqrt(3)
    t = abs(fmean(seeds)) / error if error else math.inf
    return f"{1 - 1 / math.sqrt(1 + 2 / t**2) if t else 1.0:.2g}"


def labels() -> str:
    """Quality of the dynamic labels of training and test images."""
    rows = []
    for (block, arm), runs in groups().items():
        known = [run["labels"] for run in runs if "labels" in run]
        for role in CHECKPOINTS if known else ():
            cells = []
            for images in ("train", "test"):
                found = [values[role][images] for values in known]
                cells += [percent(fmean(one["agreement"] for one in found))]
                cells += [f"{fmean(one[key] for one in found):.2f}" for key in ("entropy", "ece")]
            rows.append([block, ARMS[arm], str(len(known)), role, *cells])
    header = ["Block", "Arm", "Runs", "Checkpoint", "Training images: right", "Entropy", "ECE"]
    header += ["Test images: right", "Entropy", "ECE"]
    return table(header, rows) if rows else "No run with a guide is finished yet."


def robust() -> str:
    """AutoAttack and distances to the nearest adversarial images."""
    rows = []
    for (_, arm), runs in groups().items():
        measured = [run for run in runs if "robust" in run]
        for role in CHECKPOINTS if measured else ():
            names = ("clean", "pgd20", "fast-autoattack")
            shares = [mean(measured, at(role, name, "robust")) for name in names]
            middle = fmean(median_distance(run["robust"][role]) for run in measured)
            rows.append([ARMS[arm], str(len(measured)), role, *shares, f"{255 * middle:.1f}/255"])
    header = ["Arm", "Runs", "Checkpoint", "Clean", "PGD-20", "AutoAttack", "Median distance"]
    if not rows:
        return "Not run yet."
    return f"{table(header, rows)}\n\n{contrasts('Contrast under AutoAttack', read(STORED)['autoattack'])}"


def median_distance(tested: Values) -> float:
    """The median distance of the correctly classified images, interpolated within a bin of the histogram.

    The first bin also counts the misclassified images, whose distance is 0.
    """
    stored, clean = tested["fab-min"]["distances"], tested["clean"]
    counts = [*stored["counts"]]
    correct = round(clean["accuracy"] * clean["images"])
    counts[0] -= clean["images"] - correct
    return interpolated(counts, stored["edges"], correct / 2)


def interpolated(counts: list[int], edges: list[float], rank: float) -> float:
    """Where the cumulated `counts` reach `rank`; images without a distance follow the last bin."""
    below = 0
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return math.inf


TABLES = {
    "claim-progress": (progress, (STORED,)),
    "claim-findings": (findings, (STORED,)),
    "claim-accuracies": (accuracies, (STORED,)),
    "claim-without-augmentation": (without_augmentation, (STORED,)),
    "claim-follow-up": (follow_up, (STORED,)),
    "claim-labels": (labels, (STORED,)),
    "claim-robust": (robust, (STORED,)),
}
