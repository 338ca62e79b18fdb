"""The record log of the race: definitions with their results in bench/records, and how they were made."""

from pathlib import Path

from tables import table

from fastdynat.commands.speedrun.race_log import log_table, read_log

LOG = Path(__file__).parents[2] / "bench" / "records"


def log() -> str:
    """One table for each track, and the command, machine and commit of each result."""
    header, *rows = log_table(LOG)
    tracks = list(dict.fromkeys(row[1] for row in rows))
    parts = []
    for track in tracks:
        shown = [[f"`{row[0]}`", *row[2:]] for row in rows if row[1] == track]
        parts += [f"### {track}", table([header[0], *header[2:]], shown)]
    return "\n\n".join([*parts, made()])


def made() -> str:
    """The origin of every result, folded away; empty where there is none."""
    results = read_log(LOG)
    lines = ['??? note "How it was made"', ""] if results else []
    for name, result in results.items():
        machine = result.laps[0]["environment"]
        flags = ", ".join(machine["processor"]["flags"])
        lines += [
            f"    `bench/records/{name}.json`: {machine['cpu']} ({flags}), {machine['threads']} threads, "
            f"torch {machine['torch']}, {result.data}, {result.date}, commit `{result.commit[:10]}`.",
            "",
            *(f"    Does not count: {reason}." for reason in result.reasons),
            "",
            "    ```text",
            f"    {result.command}",
            "    ```",
            "",
        ]
    return "\n".join(lines)
