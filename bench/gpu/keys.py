"""Key figures of a part, read from the files that it wrote; a missing figure is omitted."""

import json
import re
from pathlib import Path
from typing import Any

PEERS = {"attack": "torchattacks.PGD", "step": "released loop in plain PyTorch"}


def bench(path: Path) -> str:
    """Of `fastdynat bench --json PATH`, or of the rows that it had when it was stopped."""
    partial = path.with_name(path.name + ".partial")
    done = path.is_file()
    if not done and not partial.is_file():
        return "no row"
    document = json.loads((path if done else partial).read_text())
    words = [] if done else ["stopped; so far"]
    for kind in ("step", "attack"):
        words += _rates(document, kind)
    gains = [f"{g['switch']} {g['gain']:.2f}" for g in document["switches"] if g["kind"] == "step"]
    words += [f"step with / without: {', '.join(gains)}"] if gains else []
    wrong = [row["name"] for row in document["rows"] if row["invalid"]]
    return "; ".join([*words, *([f"INVALID: {', '.join(wrong)}"] if wrong else [])])


def _rates(document: dict[str, Any], kind: str) -> list[str]:
    rows = [row for row in document["rows"] if row["kind"] == kind]
    ours = next((row for row in reversed(rows) if row["ours"] and not row["switch"]), None)
    if ours is None:
        return []
    rate = ours["images_per_s"]["median"]
    text = f"{kind} {ours['name']} {rate:,.0f} images/s, {ours['share_of_matmul']:.0%} of the matrix rate"
    seconds = document.get("epoch", {}).get("extrapolated_seconds")
    text += f", {seconds:,.1f} s for 50,000" if kind == "step" and seconds else ""
    if kind == "step" and (here := (document.get("roofline") or {}).get("here")) and not ours["invalid"]:
        text += (
            f", {here['floor_seconds']['step'] / ours['seconds']['median']:.0%} of the counted floor's rate"
        )
    peer = next((row for row in rows if row["name"].partition(", ")[0] == PEERS[kind]), None)
    counts = peer is not None and not ours["invalid"]
    return [text + (f", {rate / peer['images_per_s']['median']:.1f}x {PEERS[kind]}" if counts else "")]


def race(paths: list[Path]) -> str:
    """Of the results of `fastdynat speedrun` that are there."""
    stored = {path.stem: json.loads(path.read_text())["summary"] for path in paths if path.is_file()}
    found = {name: summary for name, summary in stored.items() if summary}  # empty before its first lap
    words = [
        f"{name} {summary['seconds']:.1f} s, PGD-20 {summary['pgd20']:.1%}, seeds: {summary['seeds']}"
        for name, summary in found.items()
    ]
    return "; ".join(words) or "no lap ended"


def last_line(log: Path) -> str:
    return log.read_text(errors="replace").rstrip().rpartition("\n")[2]


def tests(path: Path) -> str:
    return json.loads(path.read_text())["line"] if path.is_file() else "no summary"


def doctor(log: Path) -> str:
    """The operators that it dropped or found wrong, where it says so."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    wrong = [line for line in lines if re.search(r"\b(wrong|left out|fails|failed)\b", line)]
    return wrong[0][:100] if wrong else f"{len(lines)} lines"


def operators(path: Path) -> str:
    """The fused L-inf step beside a copy of the same bytes, and the slowest operator beside its copy."""
    rows = json.loads(path.read_text())["rows"]
    copies = {row["case"]: row["us"] for row in rows if row["implementation"] == "copy"}
    ours = [
        r
        for r in rows
        if r["implementation"] not in ("plain", "compiled", "copy") and r["case"] in copies and r["us"]
    ]
    best: dict[str, tuple[float, str]] = {}
    for row in ours:
        share = copies[row["case"]] / row["us"]
        best[row["case"]] = max(best.get(row["case"], (0.0, "")), (share, row["implementation"]))
    if not best:
        return f"{len(rows)} rows"
    named = next((case for case in best if case.startswith("pgd_step_linf")), next(iter(best)))
    least = min(best, key=lambda case: best[case][0])
    shown = [
        f"{case} {best[case][1]} {best[case][0]:.2f} of a copy's rate"
        for case in dict.fromkeys([named, least])
    ]
    return f"{len(best)} cases; " + "; slowest ".join(shown)


def sanitizer(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    summary = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    reached = [line for line in lines if re.match(r"\d+ of \d+: ", line)]
    how = "clean" if "clean" in lines else "stopped"
    clean = f"{how}, {reached[-1]}" if reached else f"{how}, reached nothing"
    return "; ".join([*summary[-1:], clean])


def train(path: Path) -> str:
    """Of metrics.jsonl."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not rows:
        return "no epoch ended"
    last = rows[-1]
    words = [
        f"epoch {last['epoch']}",
        f"{last['train_seconds']:.2f} s/epoch ({last['images_per_s']:,.0f} images/s)",
    ]
    robust = [
        (name, value) for name, value in last.items() if re.fullmatch(r"val_pgd\d+_acc|val_clean_acc", name)
    ]
    words += [f"{name} {value:.1%}" for name, value in robust if value is not None]
    if "fidelity_loss_fast" in last:
        words.append(
            f"attack loss {last['fidelity_loss_fast']:.4f}, reference {last['fidelity_loss_reference']:.4f}"
        )
        words += ["WEAKER"] if last["fidelity_weaker"] else []
    return ", ".join(words)


def evaluation(path: Path) -> str:
    result = json.loads(path.read_text())["results"][0]
    return (
        ", ".join(f"{a['attack']} {a['accuracy']:.1%}" for a in result["attacks"])
        + f" of {result['images']} images"
    )
