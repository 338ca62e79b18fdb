"""Markdown tables, and the stored results that some of them show."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"
Values = dict[str, Any]


def read(name: str) -> Values:
    """The stored results called `name`. Raises ValueError where a row does not count."""
    values: Values = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for row in values.get("rows", ()):
        if isinstance(row, dict) and row.get("invalid"):
            raise ValueError(
                f"{name}.json: {row['name']} does not count ({row['invalid']}); measure it again"
            )
    return values


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Four digits at most, with thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def made(*names: str) -> str:
    """The origin of the files called `names`, folded away."""
    lines = []
    for name in names:
        values = read(name)
        lines += [f"`bench/results/{name}.json`: {origin(values)}.", ""]
        commands = [entry["command"] for entry in values.get("commands", ())] or [values.get("command")]
        if commands != [None]:
            lines += ["```text", *commands, "```", ""]
    return folded("How these numbers were obtained", lines)


def folded(title: str, lines: Iterable[str]) -> str:
    """Lines of Markdown below a title that opens them; "" without any. The site and GitHub both fold them."""
    lines = list(lines)
    if not lines:
        return ""
    head = ['<details class="note" markdown="1">', f"<summary>{title}</summary>", ""]
    return "\n".join([*head, *lines, "</details>"])


def origin(values: Values) -> str:
    """Machine, versions, date and commit of a file; of its runs, where each was made by itself."""
    runs = values.get("runs")
    if isinstance(runs, dict) and all("made" in run for run in runs.values()):
        return "; ".join(dict.fromkeys(_run_origin(run["made"]) for run in runs.values()))
    machine = values["environment"]
    versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "python") if key in machine)
    made_from = f", {commit(values['commit'])}" if "commit" in values else ""
    busy = machine.get("load_average") or machine.get("load_average_at_end")
    load = f", load average {busy[0]:.1f}" if busy else ""
    threads = f"{machine['threads']} threads{load}"
    return f"{machine['cpu']}, {threads}, {versions}, {machine['time'][:10]}{made_from}"


def _run_origin(found: Values) -> str:
    threads = f"{found['threads']} thread" + "s" * (found["threads"] != 1)
    return f"runs on {found['cpu']}, {threads}, torch {found['torch']}, {commit(found['commit'])}"


def commit(value: str) -> str:
    """A commit in short; says so where the checkout had changes beside it.

    >>> commit("84c4c43b52d6214-dirty")
    'commit `84c4c43b52` with uncommitted changes'
    """
    return f"commit `{value[:10]}`" + " with uncommitted changes" * value.endswith("-dirty")
