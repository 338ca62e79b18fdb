"""The tables and notes of an evaluation."""

from typing import Any

from rich.console import Console

from fastdynat.commands.evaluate.record import median_distance
from fastdynat.evaluation.hints import clean_hint
from fastdynat.terminal.consoles import AS_IS, PlainTable

Values = dict[str, Any]
WIDE = 10_000  # columns of text, more than any table needs
LOPSIDED = 0.25  # of half an interval: by how much its sides must differ to be shown both


def print_results(records: list[Values], console: Console, *, per_class: bool = False) -> None:
    """Everything that is said about `records` at the end of an evaluation."""
    if not records:
        return
    _accuracies(records, console)
    _distances(records, console)
    if per_class:
        for record in records:
            _classes(record, console)
    hints = [f"{_title(record)}: {hint}" for record in records if (hint := clean_hint(record))]
    for line in [*_unions(records), *hints, *_zero_gradients(records), *_warnings(records)]:
        console.print(line, **AS_IS, soft_wrap=True)


def _accuracies(records: list[Values], console: Console) -> None:
    table = _accuracy_table(records, between=" ")
    wanted = console.measure(table, options=console.options.update(width=WIDE)).maximum
    # Two lines per row where one is too long to be shown whole.
    console.print(table if wanted <= console.width else _accuracy_table(records, between="\n"))
    worst = "worst: images that stay correct under every attack of the row" + _left_out(records)
    console.print(f"{worst}; gap: clean - strongest attack", **AS_IS, soft_wrap=True)


def _accuracy_table(records: list[Values], *, between: str) -> PlainTable:
    names = list(dict.fromkeys(a["attack"] for r in records for a in r["attacks"]))
    images = " and ".join(sorted({_images(r) for r in records}))
    shown = (v for r in records for v in (*r["attacks"], r["worst"], r["union"]) if v is not None)
    lopsided = any("+" in accuracy_text(values) for values in shown)
    interval = "± half a 95 % interval" + (", or +above/-below where its sides differ" if lopsided else "")
    table = PlainTable(title=f"accuracy in % {interval}, {images}", title_justify="left")
    for column in ("run", "method", "checkpoint", "epoch"):
        table.add_column(column, no_wrap=column != "run")
    for column in ("eps", *names, "worst", "gap"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        about = [_text(r[key]) for key in ("run", "method", "checkpoint", "epoch")]
        cells = {a["attack"]: accuracy_text(a, between) for a in r["attacks"]}
        worst = "-" if r["worst"] is None else accuracy_text(r["worst"], between)
        gap = "-" if r["robustness_gap"] is None else f"{100 * r['robustness_gap']:.2f}"
        table.add_row(
            *about, _radius(r).replace(" ", between), *(cells.get(name, "-") for name in names), worst, gap
        )
    return table


def accuracy_text(values: Values, between: str = " ") -> str:
    """An accuracy in % with its interval: half its width, or both sides where they differ (`LOPSIDED`).

    They do near 0 and 100 %, and of few images.
    """
    accuracy, (low, high) = values["accuracy"], values["ci"]
    above, below = (f"{100 * side:.2f}" for side in (high - accuracy, accuracy - low))
    differ = abs(high + low - 2 * accuracy) > LOPSIDED * (high - low) / 2
    if not differ or above == below:
        return f"{100 * accuracy:.2f}{between}±{50 * (high - low):.2f}"
    return f"{100 * accuracy:.2f}{between}+{above}{'/' if between == ' ' else between}-{below}"


def _images(record: Values) -> str:
    shard = "" if record["shard"] is None else f" (shard {record['shard']})"
    return f"{record['images']} test images of {record['data']}{shard}"


def _radius(record: Values) -> str:
    size = f"{255 * record['eps']:.4g}/255" if record["norm"] == "linf" else f"{record['eps']:.4g}"
    return f"{record['norm']} {size}"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _left_out(records: list[Values]) -> str:
    """The attacks that `worst` does not count, in words."""
    names = {
        a["attack"]
        for r in records
        if r["worst"]
        for a in r["attacks"]
        if a["attack"] not in r["worst"]["attacks"]
    }
    return f" except {', '.join(sorted(names))}, which use another norm or no eps" if names else ""


def _title(record: Values) -> str:
    return " ".join(str(record[key]) for key in ("run", "checkpoint") if record[key] is not None)


def _unions(records: list[Values]) -> list[str]:
    """Accuracies under all norms at once, of checkpoints that were measured under several."""
    return list(
        dict.fromkeys(
            f"{_title(r)}: {accuracy_text(r['union'])} % of the images stay correct under every attack of "
            f"{', '.join(r['union']['attacks'])}"
            for r in records
            if r["union"]
        )
    )


def _distances(records: list[Values], console: Console) -> None:
    """Of attacks that look for the nearest adversarial image."""
    found = [(r, a) for r in records for a in r["attacks"] if a["distances"] is not None]
    if not found:
        return
    table = PlainTable(title="distance of the nearest adversarial image", title_justify="left")
    for column in ("run", "attack", "median", "found in %"):
        table.add_column(column, justify="right" if column in ("median", "found in %") else "left")
    for record, attack in found:
        median, distances = median_distance(attack), attack["distances"]
        share_found = 100 * sum(d is not None for d in distances) / len(distances)
        table.add_row(
            _title(record),
            attack["attack"],
            "not found" if median is None else f"{median:.4g}",
            f"{share_found:.2f}",
        )
    console.print(table)


def _classes(record: Values, console: Console) -> None:
    table = PlainTable(title=f"accuracy in % by class: {_title(record)}", title_justify="left")
    table.add_column("class")
    for attack in record["attacks"]:
        table.add_column(attack["attack"], justify="right")
    for number, name in enumerate(record["class_names"]):
        rows = [a["per_class"][number] if number < len(a["per_class"]) else None for a in record["attacks"]]
        table.add_row(name, *("-" if value is None else f"{100 * value:.2f}" for value in rows))
    console.print(table)


def _zero_gradients(records: list[Values]) -> list[str]:
    return [
        f"{_title(r)}: {100 * a['zero_grad_share']:.2f} % of the image gradients of {a['attack']} are "
        "zero and do not move their images"
        for r in records
        for a in r["attacks"]
        if a["zero_grad_share"]
    ]


def _warnings(records: list[Values]) -> list[str]:
    return [
        f"{_title(r)}: warning: {check['name']}: {check['evidence']}; {check['remedy']}"
        for r in records
        for check in r["checks"] or []
        if not check["passed"]
    ]
