"""The record log of the race: definitions with their results in bench/records, and how they were made."""

from pathlib import Path
from statistics import mean

from tables import Values, commit, folded, percent, read, table

from fastdynat.commands.speedrun.race_log import (
    baseline,
    log_table,
    read_log,
    same_images,
    same_machine,
    speedup_text,
)
from fastdynat.commands.speedrun.race_results import StoredResult
from fastdynat.commands.speedrun.record_definition import definition_names, read_definition

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
    lines: list[str] = []
    for name, result in results.items():
        machine = result.laps[0]["environment"]
        flags = ", ".join(machine["processor"]["flags"])
        lines += [
            f"`bench/records/{name}.json`: {machine['cpu']} ({flags}), {machine['threads']} threads, "
            f"torch {machine['torch']}, {result.data}, {result.date}, {commit(result.commit)}.",
            "",
            *(f"Does not count: {reason}." for reason in result.reasons),
            "",
            "```text",
            result.command,
            "```",
            "",
        ]
    return folded("How these numbers were obtained", lines)


def predictions() -> str:
    """Each record of a race beside the one that it changes: the factor counted, and the one measured.

    A definition that was raced without its prediction got it with the results: the table says so.
    """
    results, rows = read_log(LOG), []
    for name in (row[0] for row in log_table(LOG)[1:]):
        if name in results and name in definition_names():
            record, result = read_definition(name), results[name]
            before = result.alongside.get(record.against or "")
            if record.predicted and before:
                measured = mean(before) / result.summary["seconds"]
                when = "before" if result.definition.get("predicted") == record.predicted else "after"
                rows.append([f"`{name}`", f"`{record.against}`", record.predicted, when, f"{measured:.2f}x"])
    header = ["record", "previous record", "speed-up by counting", "counted", "measured"]
    return table(header, rows)


def fastest() -> str:
    """The fastest record that reaches the baseline's target, the fastest that counts, and the baseline."""
    results = read_log(LOG)
    base = _baseline(results)
    best, counting = _fastest(results, base), _counting(results, base)
    named = {"The fastest": best} if best is not counting else {}
    named["The fastest that counts"] = counting
    sentences = [
        f"{kind} is `{result.name}` with {result.summary['seconds']:.1f} s{_beside(result, base)}."
        for kind, result in named.items()
    ]
    return " ".join([*sentences, f"The baseline takes {base.summary['seconds']:.0f} s."])


def race_row() -> list[str]:
    """The baseline beside the fastest record that counts for its target, with the log's speed-up."""
    results = read_log(LOG)
    base = _baseline(results)
    best = _counting(results, base)
    race = "[race](docs/speedrun.md): Madry's PGD-10, ours single-step"
    what = f"Training to {100 * base.target:g} % under PGD-20 on CIFAR-10, plain loop ({race})"
    seconds = (f"{result.summary['seconds']:.1f} s" for result in (base, best))
    return [what, *seconds, speedup_text(best.definition["track"], best, results)]


def _baseline(results: dict[str, StoredResult]) -> StoredResult:
    """The baseline of the track cpu-2, on CIFAR-10 as JPEG."""
    found = baseline("cpu-2", "CIFAR-10 (JPEG)", results)
    assert found is not None
    return found


def _fastest(results: dict[str, StoredResult], base: StoredResult) -> StoredResult:
    """The fastest record that reaches the baseline's target, on the baseline's images and kind of machine."""
    rivals = [
        result
        for result in results.values()
        if result.target == base.target
        and result is not base
        and result.laps
        and same_images(result, base)
        and same_machine(result, base)
    ]
    reached = [result for result in rivals if result.summary["pgd20"] >= base.target]
    return min(reached, key=lambda result: result.summary["seconds"])


def _counting(results: dict[str, StoredResult], base: StoredResult) -> StoredResult:
    """The fastest that counts."""
    return _fastest({name: result for name, result in results.items() if result.counts}, base)


def _beside(result: StoredResult, base: StoredResult) -> str:
    """How many times as long the baseline took in the same race; nothing where it was not raced."""
    beside = result.alongside.get(base.name)
    return f", {mean(beside) / result.summary['seconds']:.0f} times as fast as the baseline" if beside else ""


def levers() -> str:
    """Trials of one seed: with fastdynat, each group beside its first one kept, and in plain PyTorch."""
    values = read("speedrun_levers_cpu")
    plain = [[row["lever"], percent(row["clean"]), percent(row["pgd20"])] for row in values["plain"]]
    return "\n\n".join(
        (
            *_trials(values),
            *_trials(values["short"]),
            *_objectives(values["objective"]),
            table(["trial in plain PyTorch", "clean", "PGD-20"], plain),
        )
    )


def _trials(values: Values) -> tuple[str, str]:
    """The table of a group of trials, and the flags that they share."""
    rows = [
        [
            row["lever"] + " (**kept**)" * row["kept"],
            percent(row["pgd20"]),
            _difference(row),
            f"`{row['flags']}`",
        ]
        for row in values["rows"]
    ]
    return (
        table(["trial", "PGD-20", "difference, points", "flags"], rows),
        f"These trials use the flags `{values['common']}` unless a trial overrides them.",
    )


def _objectives(values: Values) -> tuple[str, str]:
    """What the attack of training maximises, by three attacks on the trained network."""
    rows = [
        [
            row["lever"],
            *(percent(row[key]) for key in ("clean", "pgd20", "margin20")),
            f"{100 * row['gap']:.1f}",
            f"`{row['flags']}`",
        ]
        for row in values["rows"]
    ]
    header = ("objective", "clean", "PGD-20", "PGD-20 on the margin", "gap, points", "flags")
    return table(header, rows), f"These trials use the flags `{values['common']}` unless overridden."


def _difference(row: dict[str, float]) -> str:
    if not row["difference_se"]:
        return ""
    return f"{100 * row['difference']:+.1f} ± {200 * row['difference_se']:.1f}"


def logit_scale() -> str:
    """PGD-20 on multiples of the logits, beside AutoAttack: means over the seeds of each record."""
    values = read("logit_scale_cpu")
    rows = [
        [
            f"`{name}`",
            *(percent(mean(lap["pgd20"][f"{scale:g}"] for lap in laps)) for scale in values["scales"]),
            percent(mean(lap["autoattack"] for lap in laps)),
        ]
        for name, laps in values["records"].items()
    ]
    return table(["record", *(f"x {scale:g}" for scale in values["scales"]), "AutoAttack"], rows)


TABLES = {
    "speedrun-levers": (levers, ("speedrun_levers_cpu",)),
    "logit-scale": (logit_scale, ("logit_scale_cpu",)),
}
