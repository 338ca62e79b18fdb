"""The page: what stands in each of its sections."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from fastdynat import __version__
from fastdynat.commands.report import report_charts as charts
from fastdynat.commands.report import report_tables as tables
from fastdynat.commands.report.compute import Findings
from fastdynat.commands.report.findings import ATTACK, NEAREST, PICTURES
from fastdynat.commands.report.report_charts import Look, Panel
from fastdynat.commands.report.report_config import ReportConfig
from fastdynat.commands.report.report_tables import Missing, command, percent
from fastdynat.commands.report.run_records import Record
from fastdynat.evaluation import Measurement
from fastdynat.evaluation.curves import EpsCurve, curve_of_distances
from fastdynat.evaluation.margins import Margins, margins

SHEETS = ("trade-off.png", "training.png", "radius.png", "classes.png", "transfer.png")  # of the sections
CLASSES = 12  # columns of the chart of classes
SERIES = (  # column of metrics.jsonl, title, factor
    ("val_pgd10_acc", "robust validation accuracy (PGD-10), %", 100.0),
    ("val_clean_acc", "clean validation accuracy, %", 100.0),
    ("loss", "training loss (first epoch = 1)", 1.0),
    ("label_agreement", "label agreement, %", 100.0),
)


@dataclass(frozen=True)
class Section:
    """Charts under one heading with what they show; `file` is the name of their PNG."""

    id: str
    title: str
    text: str
    panels: list[Panel] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    @property
    def file(self) -> str:
        return f"{self.id}.png"


@dataclass(frozen=True)
class Report:
    """Everything that is drawn."""

    records: Sequence[Record]
    found: Findings
    config: ReportConfig
    looks: Mapping[str, Look]

    def without(self, kind: str, what: str) -> list[Missing]:
        """A note on the runs that lack the finding `kind`."""
        names = [r.name for r in self.records if r.checkpoints and r.name not in self.found.of_run[kind]]
        return [Missing(f"Not computed yet: {what} of {', '.join(names)}.", self.command)] if names else []

    @property
    def command(self) -> str:
        """The command that computes what is missing."""
        return command("report", *(r.path for r in self.records), "--out", self.config.out)

    def sections(self) -> list[Section]:
        """The sections with charts, by their id."""
        return [trade(self), progress(self), radius(self), classes(self), transfer(self)]


def trade(report: Report) -> Section:
    """Robust over clean accuracy."""
    points: dict[str, list[dict[str, Any]]] = {}
    for record in report.records:
        for checkpoint in record.checkpoints:
            worst, natural = tables.strongest(checkpoint), tables.clean(checkpoint)
            if worst and natural:
                both = {"clean": (natural.accuracy, natural.ci), "robust": (worst[1].accuracy, worst[1].ci)}
                points.setdefault(record.name, []).append(both | {"filled": checkpoint.names != ("last",)})
    drawn = charts.draw_trade(points, report.looks)
    names = ", ".join(points)
    panels = (
        [Panel("robust over clean accuracy", f"Robust over clean test accuracy of {names}.", drawn)]
        if points
        else []
    )
    text = (
        "Each dot is a checkpoint under the strongest attack on these images, at the radius of evaluation; "
        "bars are 95 % intervals. Up and to the right is better. A ring is a last checkpoint "
        "that is not the best one."
    )
    return Section("trade-off", "Clean against robust", text, panels)


def progress(report: Report) -> Section:
    """Metrics over epochs and over seconds."""
    records = report.records
    unit = charts.time_unit(max((tables.training_seconds(r) for r in records), default=0))
    panels = []
    for column, title, factor in SERIES:
        shown = [r for r in records if charts.series(r, column, factor, None)]
        for name, by in (("epochs", None), ("time", unit)) if shown else ():
            ends = "; ".join(
                f"{r.name} ends at {charts.series(r, column, factor, None)[-1][1]:.3g}" for r in shown
            )
            drawn = charts.draw_series(shown, report.looks, column, factor, by)
            panels.append(Panel(f"{title}, over {name}", f"{title} over {name}: {ends}.", drawn))
    empty = [r for r in records if not r.rows]
    missing = [
        Missing(f"{r.name} has no finished epoch.", command("train", "--resume", r.path)) for r in empty
    ]
    text = (
        "Left: over epochs. Right: over seconds of training, without validation. The ring is the epoch with "
        "the highest robust validation accuracy. Losses of different methods are different functions, so "
        "each is shown relative to its first epoch."
    )
    return Section("training", "Training", text, panels, missing)


def radius(report: Report) -> Section:
    """Accuracy over eps and margins, charts for each norm."""
    nearest = {r.name: m for r in report.records if (m := nearest_measurement(report, r)) is not None}
    norms = {r.name: c.sidecar.norm for r in report.records if (c := r.checkpoint(report.config.checkpoint))}
    panels = []
    for norm in dict.fromkeys(norms.values()):
        curves = {n: EpsCurve(**v) for n, v in report.found.of_run["curve"].items() if norms[n] == norm}
        if curves:
            panels.append(_curves(f"accuracy over eps ({norm}), {ATTACK}", curves, report.looks))
        found = {n: m for n, m in nearest.items() if norms[n] == norm}
        if found:
            largest = max((d or 0 for m in found.values() for d in m.distances or []), default=0)
            steps = [largest * i / 60 for i in range(61)]
            beyond = {n: curve_of_distances(m, norm, steps) for n, m in found.items()}
            name = ", ".join(dict.fromkeys(m.attack for m in found.values()))
            panels.append(_curves(f"share of images beyond eps ({norm}), {name}", beyond, report.looks))
            panels.append(
                _margins(
                    f"margins ({norm}), {name}", {n: margins(m, norm) for n, m in found.items()}, report.looks
                )
            )
    text = (
        f"{ATTACK} is run separately at each radius, with a step size of a quarter of the radius. A "
        "minimum-norm attack gives each image a distance: the share of images beyond a radius is an accuracy "
        "at that radius. No attack is certain to find the nearest adversarial image, so distances are upper "
        "bounds; those of misclassified images are 0. Bands are 95 % intervals."
    )
    missing = report.without("curve", "the accuracy over eps")
    return Section("radius", "Accuracy over the radius", text, panels, missing)


def nearest_measurement(report: Report, record: Record) -> Measurement | None:
    """The run's measurement with distances: a stored one of `chosen_images`, else the report's.

    One of the present code goes first.
    """
    checkpoint = record.checkpoint(report.config.checkpoint)
    chosen = set() if checkpoint is None else tables.chosen_images(checkpoint)
    stored = [] if checkpoint is None else [m for m in checkpoint.measured if m.test_images in chosen]
    sidecar = None if checkpoint is None else checkpoint.sidecar
    own = [
        s
        for s in stored
        if sidecar
        and s.source is None
        and (s.dataset, s.norm) == (sidecar.dataset, sidecar.norm)
        and s.result.distances is not None
    ]
    if own:
        return max(own, key=lambda s: s.current).result
    value = report.found.of_run["nearest"].get(record.name)
    return None if value is None else Measurement(**value)


def _curves(title: str, curves: Mapping[str, EpsCurve], looks: Mapping[str, Look]) -> Panel:
    alt = "; ".join(
        f"{name} from {percent(c.accuracy[0])} % to {percent(c.accuracy[-1])} %" for name, c in curves.items()
    )
    return Panel(title, f"{title}: {alt}.", charts.draw_curves(curves, looks))


def _margins(title: str, found: Mapping[str, Margins], looks: Mapping[str, Look]) -> Panel:
    medians = "; ".join(
        f"{name} {'none' if m.median is None else f'{charts.scale(m.norm)[0] * m.median:.3g}'}"
        for name, m in found.items()
    )
    return Panel(title, f"{title}; medians: {medians}.", charts.draw_margins(found, looks))


def classes(report: Report) -> Section:
    """Accuracies of each class, without an attack and under the strongest one."""
    panels, cut = [], False
    for title, choose in (
        ("clean", tables.clean),
        ("strongest attack", lambda c: (found := tables.strongest(c)) and found[1]),
    ):
        for names, rows in _by_classes(report, choose):
            worst = _lowest(rows, CLASSES)
            cut = cut or len(worst) < len(names)
            values = [[row[k] for k in worst] for row in rows.values()]
            lowest = "; ".join(f"{n} lowest for {names[_lowest([row], 1)[0]]}" for n, row in _known(rows))
            drawn = charts.draw_heat(values, list(rows), [names[k] for k in worst])
            head = f"accuracy by class, %: {title}"
            panels.append(Panel(head, f"{head}: {lowest}.", drawn, 1.1 + 0.26 * len(rows)))
    which = report.config.checkpoint
    text = f"Of the {which} checkpoint, unless only the other one was evaluated." + (
        f" The {CLASSES} weakest classes are shown." if cut else ""
    )
    missing = (
        []
        if panels
        else [Missing("No run has been evaluated.", command("eval", *(r.path for r in report.records)))]
    )
    return Section("classes", "Class by class", text, panels, missing)


ClassRows = dict[str, list[float | None]]


def _by_classes(
    report: Report, choose: Callable[..., Measurement | None]
) -> Iterator[tuple[tuple[str, ...], ClassRows]]:
    """Runs with the same class names, with accuracies by class of the measurement chosen by `choose`."""
    groups: dict[tuple[str, ...], ClassRows] = {}
    for record in report.records:
        # The one that the report is about, unless only the other one was evaluated.
        ordered = sorted(
            record.checkpoints, key=lambda c: c is not record.checkpoint(report.config.checkpoint)
        )
        for checkpoint, measurement in [(c, m) for c in ordered if (m := choose(c))][:1]:
            names = checkpoint.sidecar.class_names
            values = (measurement.per_class + [None] * len(names))[: len(names)]
            groups.setdefault(names, {})[record.name] = values
    yield from groups.items()


def _known(rows: ClassRows) -> list[tuple[str, list[float | None]]]:
    return [(name, row) for name, row in rows.items() if any(v is not None for v in row)]


def _lowest(rows: Any, count: int) -> list[int]:
    """The `count` classes with the lowest accuracy in sum, in the order of the classes."""
    values = list(rows.values() if isinstance(rows, dict) else rows)
    sums = [sum(1.0 if v is None else v for v in column) for column in zip(*values, strict=True)]
    return sorted(sorted(range(len(sums)), key=sums.__getitem__)[:count])


def transfer(report: Report) -> Section:
    """Accuracies of each network on the adversarial images of each."""
    panels = []
    for number, matrix in enumerate(report.found.transfers, 1):
        names = matrix["names"]
        which = f" ({number})" if len(report.found.transfers) > 1 else ""
        title = f"accuracy under {matrix['attack']} made on another run, %{which}"
        pairs = "; ".join(
            f"made on {source}: "
            + ", ".join(f"{target} {percent(a, 0)}" for target, a in zip(names, row, strict=True))
            for source, row in zip(names, matrix["accuracy"], strict=True)
        )
        values = [*matrix["accuracy"], matrix["clean"]]
        drawn = charts.draw_heat(values, [*names, "no attack"], names, "attacked network")
        panels.append(Panel(title, f"{title}: {pairs}.", drawn, 1.3 + 0.3 * len(values)))
    text = (
        "Rows are the networks on which the adversarial images were made, columns the networks that classify "
        "them; the diagonal is the white-box attack. A number lower than the diagonal's in its column means "
        "that the white-box attack was not the strongest: a sign of masked gradients."
    )
    lacks = (
        [Missing("Not computed yet: the transfer matrix.", report.command)] if len(report.records) > 1 else []
    )
    alone = [
        Missing(
            "One run alone has no transfer matrix.", command("report", report.records[0].path, "OTHER_RUN")
        )
    ]
    missing = [] if panels else (lacks or alone)
    return Section("transfer", "Transfer", text, panels, missing)


def gradients(report: Report) -> dict[str, Any]:
    """Images, perturbations and what the gradients look at."""
    runs = [{"name": name, **value} for name, value in report.found.of_run["examples"].items()]
    return {"runs": runs, "missing": report.without("examples", "images and saliency"), "kinds": PICTURES}


def belief(report: Report) -> dict[str, Any]:
    """The checks for masked gradients."""
    runs = []
    for name, value in report.found.of_run["masking"].items():
        checks = value["checks"]
        runs.append({"name": name, "checks": checks, "warnings": [c for c in checks if not c["passed"]]})
    return {"runs": runs, "missing": report.without("masking", "the checks for masked gradients")}


def render(report: Report, sections: Sequence[Section], made: str) -> str:
    """The page as HTML: self-contained, every value escaped."""
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = env.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    radii = {
        r.name: tables.describe_radius(c.sidecar.norm, c.sidecar.eval_eps)
        for r in report.records
        if (c := r.checkpoint(report.config.checkpoint))
    }
    return template.render(
        version=__version__,
        made=made,
        config=report.config,
        command=report.command,
        looks=report.looks,
        runs=tables.run_rows(report.records),
        accuracy=tables.accuracy_table(report.records),
        other_images=tables.other_images(report.records),
        unevaluated=tables.unevaluated(report.records),
        gaps=tables.gap_rows(report.records),
        sections={section.id: section for section in sections},
        svg=charts.svg,
        gradients=gradients(report),
        belief=belief(report),
        radii=radii,
        attack=ATTACK,
        nearest=NEAREST,
        percent=percent,
    )
