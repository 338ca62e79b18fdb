"""The record log on the terminal: a narrow table for each machine, and a line about each record below it."""

import textwrap
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console

import fastdynat
from fastdynat.commands.speedrun.race_log import HEADER, NOT_MEASURED, log_table
from fastdynat.commands.speedrun.race_rules import LARGEST_GAP
from fastdynat.terminal.consoles import AS_IS, PlainTable

WIDTH = 100  # columns of the text at most
IN_TABLE = ("record", "date", "target %", "seconds", "PGD-20 %", "AutoAttack %", "speed-up", "counts")
NOTES = (
    f"counts: no means that AutoAttack is more than {100 * LARGEST_GAP:g} points below PGD-20, or that "
    "another rule of docs/speedrun.md is broken.",
    "speed-up: over the plain loop, for records that count and have its target.",
    "~: not raced against it; the product of the ratios of two or more races, or the ratio of the seconds of "
    "two.",
)


def stored_results() -> Path:
    """The results of the checkout that this package is imported from; an installed package has none."""
    return Path(fastdynat.__file__).parents[1] / "bench" / "records"


def show_log(console: Console, folder: Path, track: str | None) -> None:
    """Print the records of `track`, or of all, with their results in `folder`.

    Times compare within one kind of machine, so each has its own table.
    """
    rows = [dict(zip(HEADER, row, strict=True)) for row in log_table(folder, track)[1:]]
    measured = [row for row in rows if row["seconds"] != NOT_MEASURED]
    measured.sort(key=_place)  # stable: a record still follows the one that it changes
    for (name, machine), group in groupby(measured, _place):
        console.print(f"{name}: {machine}", **AS_IS)
        console.print(_table(list(group)), "", **AS_IS)
    for note in NOTES if measured else ():
        console.print(_filled(note, console), **AS_IS)
    console.print("" if measured else f"no results at {folder}; run in the checkout or pass --log", **AS_IS)
    for row in rows:
        waiting = f" ({NOT_MEASURED})" if measured and row not in measured else ""
        console.print(_filled(f"{row['record']}{waiting}: {row['what changed']}", console), **AS_IS)


def _place(row: dict[str, str]) -> tuple[str, str]:
    return row["track"], row["machine"]


def _table(rows: list[dict[str, str]]) -> PlainTable:
    table = PlainTable(box=SIMPLE_HEAD, padding=0, collapse_padding=True, show_edge=False)
    for name in IN_TABLE:  # a header may take two lines, a value never does
        longest = max(len(text) for text in (*name.split(), *(row[name] for row in rows)))
        table.add_column(name, min_width=longest, max_width=longest)
    for row in rows:
        table.add_row(*(row[name] for name in IN_TABLE))
    return table


def _filled(text: str, console: Console) -> str:
    width = min(WIDTH, console.width)
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
