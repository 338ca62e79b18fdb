"""Markdown tables, and the stored results that some of them show."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"
Values = dict[str, Any]


def read(name: str) -> Values:
    """The stored results called `name`."""
    values: Values = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
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
    lines = ['??? note "How these numbers were obtained"', ""]
    for name in names:
        values = read(name)
        machine = values["environment"]
        versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "python") if key in machine)
        commit = f", commit `{values['commit'][:10]}`" if "commit" in values else ""
        busy = machine.get("load_average") or machine.get("load_average_at_end")
        load = f", load average {busy[0]:.1f}" if busy else ""
        lines += [
            f"    `bench/results/{name}.json`: {machine['cpu']}, {machine['threads']} threads{load}, "
            f"{versions}, {machine['time'][:10]}{commit}.",
            "",
        ]
        commands = [entry["command"] for entry in values.get("commands", ())] or [values.get("command")]
        if commands != [None]:
            lines += ["    ```text", *(f"    {command}" for command in commands), "    ```", ""]
    return "\n".join(lines)
