"""`fastdynat report`: the page's content and escaping, missing measurements, reuse by a second call."""

import base64
import json
import re
import shlex
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from PIL import Image
from safetensors.torch import load_file
from support.networks import tiny_cnn
from torch import Tensor

from fastdynat.commands.evaluate.measurement_store import FORMAT
from fastdynat.commands.figures import TEXT
from fastdynat.commands.main import main
from fastdynat.commands.report.report_config import ReportConfig
from fastdynat.commands.report.run_records import ReportedCheckpoint, _short_name, read_records
from fastdynat.data import ImageSet
from fastdynat.evaluation import Stopped
from fastdynat.evaluation.outcome import Measurement
from fastdynat.runs import code_version, read_sidecar

pytestmark = needs("matplotlib", "jinja2")
TINY = [
    "--train-size",
    "200",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--quiet",
]
FAST = ["--num-images", "12", "--batch-size", "12"]
EVIL = '<img src=x onerror="alert(1)"> & $x$'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, ids, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = text, [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id")]


def write_measurement(
    run: Path,
    attack: str,
    correct: int,
    *,
    images: int = 20,
    digest: str = "0",
    eps: float = 0.1,
    distances: Tensor | None = None,
    **key: Any,
) -> None:
    """A file as `fastdynat eval` leaves it."""
    robust = torch.arange(images) < correct
    labels = torch.arange(images) % 10
    measurement = Measurement.of(
        attack, robust, labels, classes=10, seconds=1.0, batch_size=images, distances=distances
    )
    weights = read_sidecar((run / "last").resolve() / "model.safetensors")[1]
    about = {
        "run": str(run),
        "checkpoint": "last",
        "norm": "linf",
        "eps": eps,
        "images": images,
        "dataset": "digits",
    }
    keys = {
        "weights": weights,
        "images": digest,
        "attack": attack,
        "search": None,
        "seed": 1,
        "batch_size": 20,
        "amp": "off",
    }
    path = run / "evaluations" / f"{attack}-{images}-{digest[:4]}-{len(key)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"format": FORMAT, "key": keys | key, "about": about, "measurement": asdict(measurement)})
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, one of them with a name that is no HTML, and their evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    for method, name in (("dynat", "dynat"), ("fgsm_rs", EVIL.replace("/", "-"))):
        assert main(["train", "--method", method, "--run-dir", str(folder / name), *TINY]) == 0
        for attack, correct in (("clean", 18), ("fgsm", 12), ("pgd20", 9)):
            write_measurement(folder / name, attack, correct)
    return folder


@pytest.fixture(scope="module")
def written(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report of both runs."""
    out = tmp_path_factory.mktemp("report")
    assert main(["report", *map(str, sorted(trained.iterdir())), "--out", str(out), *FAST]) == 0
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "index.html").read_text())


def report(out: Path, *argv: object) -> Page:
    assert main(["report", *map(str, argv), "--out", str(out), *FAST]) == 0
    return Page((out / "index.html").read_text())


def test_the_page_is_well_formed_and_needs_nothing_else(page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not page.all("script")
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"url\((?!['\"]?#)|@import", page.text)
    links = {attrs["href"][1:] for attrs in page.all("a") if (attrs["href"] or "").startswith("#")}  # type: ignore[index]
    assert len(links) == 9
    assert links <= set(page.ids)
    for attrs in page.all("use"):
        assert (attrs.get("xlink:href") or "")[1:] in page.ids
    for used in re.findall(r"url\(#([^)]*)\)", page.text):
        assert used in page.ids


def test_everything_that_is_seen_is_said(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 2 * 6 * 5
    assert all(attrs.get("alt") for attrs in images)
    charts = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(charts) == len(page.all("svg")) >= 14
    assert all(len(attrs["aria-label"] or "") > 20 for attrs in charts)
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))


def test_names_of_runs_are_escaped(page: Page) -> None:
    name = EVIL.replace("/", "-")
    assert name not in page.text
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt; &amp; $x$" in page.text
    assert all((attrs.get("src") or "").startswith("data:image/png;base64,") for attrs in page.all("img"))


def test_the_accuracies_are_those_of_the_evaluations(page: Page) -> None:
    table = page.text[page.text.index('id="accuracy"') : page.text.index('id="belief"')]
    values = re.findall(r'<td class="n">(\d+\.\d+)<small>([\d.]+)–([\d.]+)', table)  # noqa: RUF001
    assert [value for value, _, _ in values] == ["90.00", "60.00", "45.00"] * 2
    # Wilson's interval of 9 in 20, from a table.
    assert values[2][1:] == ("25.8", "65.8")
    assert table.count('<td class="n">45.0</td>') == 2  # the gap
    assert table.count("linf 25.5/255") == 2


def test_charts_take_the_colour_of_the_page(written: Path, page: Page) -> None:
    assert TEXT not in page.text
    assert "fill: currentColor" in page.text
    for path in written.glob("*.png"):
        assert path.stat().st_size < 150_000
        pixels = np.asarray(Image.open(path).convert("RGBA"))
        assert (pixels[..., 3] == 0).mean() > 0.1, f"{path} is not transparent"
        assert pixels[..., 3].max() == 255
    names = {path.name for path in written.glob("*.png")}
    assert names == {
        "trade-off.png",
        "training.png",
        "radius.png",
        "classes.png",
        "transfer.png",
        "images-1.png",
        "images-2.png",
    }


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    """WCAG 2.1."""
    low, high = sorted(map(_luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_light_and_dark(page: Page) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert min(contrast(TEXT, "#ffffff"), contrast(TEXT, "#000000")) >= 4.5
    schemes = [
        dict(re.findall(r"--(\w+): (#\w+)", block))
        for block in re.findall(r":root \{(.*?)\}", page.text, re.S)
    ]
    assert len(schemes) == 3
    for scheme in (schemes[0], schemes[1]):
        for text in ("ink", "muted", "accent", "warn", "good"):
            assert contrast(scheme[text], scheme["paper"]) >= 4.5, (text, scheme)
            assert contrast(scheme[text], scheme["card"]) >= 4.5, (text, scheme)


def test_numbers_on_colours_can_be_read() -> None:
    from matplotlib.colors import to_hex

    from fastdynat.commands.report.report_charts import RAMP, readable_on

    for share in np.linspace(0, 1, 50):
        colour = RAMP(share)
        assert contrast(readable_on(colour[:3]), to_hex(colour)) >= 4.5


def test_a_second_call_only_draws(
    trained: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdynat.commands.report import compute

    def refuse(*args: object, **kwargs: object) -> Any:
        raise AssertionError("nothing is to be computed")

    out = Path(shutil.copytree(written, tmp_path / "out"))
    monkeypatch.setattr(compute, "load_test", refuse)
    monkeypatch.setattr(compute, "load_network", refuse)
    before = (out / "findings.json").read_bytes()
    runs = sorted(trained.iterdir())
    again = report(out, *runs)
    assert (out / "findings.json").read_bytes() == before
    assert len(again.all("svg")) == len(Page((written / "index.html").read_text()).all("svg"))
    # Other settings are other findings.
    with pytest.raises(AssertionError, match="nothing is to be computed"):
        report(out, *runs, "--seed", "2")


def test_only_what_is_missing_is_computed(
    trained: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdynat.commands.report import compute

    out = Path(shutil.copytree(written, tmp_path / "out"))
    document = json.loads((out / "findings.json").read_text())
    dropped = next(entry for entry in document["findings"] if entry["key"]["kind"] == "curve")
    document["findings"].remove(dropped)
    (out / "findings.json").write_text(json.dumps(document))
    done = []

    def spy(kind: str, function: Any) -> Any:
        return lambda *args: done.append(kind) or function(*args)

    monkeypatch.setattr(
        compute, "KINDS", {kind: spy(kind, function) for kind, function in compute.KINDS.items()}
    )
    report(out, *sorted(trained.iterdir()))
    assert done == ["curve"]
    again = {
        json.dumps(e["key"], sort_keys=True): e["value"]
        for e in json.loads((out / "findings.json").read_text())["findings"]
    }
    assert again[json.dumps(dropped["key"], sort_keys=True)] == dropped["value"]


def test_an_interrupted_report_keeps_what_is_done(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from fastdynat.commands.report import compute

    def interrupted(subject: Any, means: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        assert means.should_stop()
        raise Stopped

    kinds = {"curve": compute.findings.curve, "masking": interrupted}
    monkeypatch.setattr(compute, "KINDS", {**compute.KINDS, **kinds, "nearest": interrupted})
    monkeypatch.setattr(
        compute, "KINDS", {kind: compute.KINDS[kind] for kind in ("curve", "masking", "examples", "nearest")}
    )
    runs = sorted(trained.iterdir())
    assert main(["report", *map(str, runs), "--out", str(tmp_path), *FAST]) == 128 + signal.SIGINT
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert [entry["key"]["kind"] for entry in findings] == ["curve"]
    page = Page((tmp_path / "index.html").read_text())
    assert "Not computed yet: images and saliency" in page.text
    assert "accuracy over eps (linf)" in page.text


def test_without_attacks_and_evaluations_the_page_says_what_makes_them(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "dynat", tmp_path / "bare", symlinks=True))
    shutil.rmtree(run / "evaluations")
    page = report(tmp_path / "out", run, "--no-attacks")
    assert f"Run <code>fastdynat eval {run}</code>" in page.text
    assert page.text.count(f"fastdynat report {run} --out {tmp_path / 'out'}") >= 3
    assert len(page.all("svg")) == 8  # the training alone
    assert not (tmp_path / "out" / "findings.json").exists()
    assert not (tmp_path / "out" / "classes.png").exists()


def test_runs_without_an_epoch_or_a_checkpoint_are_listed(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    shutil.copy(trained / "dynat" / "config.yaml", run)
    page = report(tmp_path / "out", run, trained / "dynat", "--no-attacks")
    assert f"begun has no checkpoint yet. Run <code>fastdynat train --resume {run}</code>" in page.text
    assert "begun has no finished epoch." in page.text


def test_measurements_of_other_weights_and_parts_of_one_do_not_count(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "dynat", tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "evaluations")
    write_measurement(run, "pgd20", 3, weights="0" * 64)
    write_measurement(run, "pgd20", 4, standing="0", shard="1/2")
    page = report(tmp_path / "out", run, "--no-attacks")
    assert "run has only evaluations of checkpoints that are gone." in page.text
    write_measurement(run, "pgd20", 5)
    write_measurement(run, "pgd20", 11, images=30)  # of more images: it counts
    page = report(tmp_path / "out", run, "--no-attacks")
    assert "36.67<small>" in page.text
    assert "25.00<small>" not in page.text


def test_measurements_on_other_data_do_not_mix_with_the_run_s_own(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "dynat", tmp_path / "run", symlinks=True))
    for file in list((run / "evaluations").iterdir()):
        values = json.loads(file.read_text())
        values["about"]["dataset"] = "imagefolder"
        values["measurement"] |= {"accuracy": 0.05, "correct": 1}
        file.with_name(f"aa-{file.name}").write_text(json.dumps(values))
    from fastdynat.commands.report.report_tables import clean, strongest

    (record,) = read_records([run])
    checkpoint = record.checkpoint("last")
    assert checkpoint is not None
    worst, natural = strongest(checkpoint), clean(checkpoint)
    assert worst is not None
    assert natural is not None
    assert (natural.accuracy, worst[1].accuracy) == (0.9, 0.45)


def only_checkpoint(run: Path) -> ReportedCheckpoint:
    (record,) = read_records([run])
    checkpoint = record.checkpoint("last")
    assert checkpoint is not None
    return checkpoint


def shown(run: Path) -> tuple[float, str, float]:
    """Clean accuracy, strongest attack and its accuracy, after a check of the gap in the table."""
    from fastdynat.commands.report.report_tables import accuracy_table, clean, strongest

    worst, natural = strongest(only_checkpoint(run)), clean(only_checkpoint(run))
    assert worst is not None
    assert natural is not None
    (row,) = accuracy_table(read_records([run]))["rows"]
    assert float(row["gap"]) == pytest.approx(100 * (natural.accuracy - worst[1].accuracy), abs=0.05)
    return natural.accuracy, worst[0].attack, worst[1].accuracy


@pytest.fixture
def bare(trained: Path, tmp_path: Path) -> Path:
    """A run without evaluations."""
    run = Path(shutil.copytree(trained / "dynat", tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "evaluations")
    return run


def test_accuracies_of_a_row_are_of_the_same_images(bare: Path, tmp_path: Path) -> None:
    for attack, correct in (("clean", 36), ("pgd20", 20)):
        write_measurement(bare, attack, correct, images=40)
    write_measurement(bare, "pgd10", 2, images=10)  # lower, but of few images
    assert shown(bare) == (0.9, "pgd20", 0.5)
    page = report(tmp_path / "out", bare, "--no-attacks")
    assert "left out, because they are of other images: pgd10 20.00 % (10 images of digits)." in page.text
    assert "20.00<small>" not in page.text


def test_a_stronger_attack_on_fewer_images_is_said_to_be_lower(bare: Path, tmp_path: Path) -> None:
    """90 and 50 % of 100 images are shown; 40 % of 10 are not, and their distances neither."""
    from fastdynat.commands.report.compute import KINDS, Findings
    from fastdynat.commands.report.page import Report, nearest_measurement

    for attack, correct in (("clean", 90), ("pgd20", 50)):
        write_measurement(bare, attack, correct, images=100)
    for attack, correct in (("clean", 9), ("fast-autoattack", 4)):
        write_measurement(bare, attack, correct, images=10, digest="aa" * 32)
    search = {"norm": "linf", "eps": 0.1}
    near = {"distances": torch.full((10,), 0.05), "search": search}
    write_measurement(bare, "fab-min", 4, images=10, digest="aa" * 32, **near)
    write_measurement(bare, "pgd10", 1, images=10, digest="aa" * 32, eps=0.2)  # of a larger radius
    assert shown(bare) == (0.9, "pgd20", 0.5)
    text = report(tmp_path / "out", bare, "--no-attacks").text
    for said in (
        "clean 90.00 % (10 images of digits)",
        "fast-autoattack 40.00 % (10 images of digits)",
        "fab-min 40.00 % (10 images of digits)",
        "pgd10 10.00 % (10 images of digits, linf 51/255)",
        "Lower than the worst case that is shown, 50.00 % under pgd20: fab-min, fast-autoattack.",
        f"eval {bare} --checkpoints last --attacks fab-min,fast-autoattack --num-images 100</code>",
        "under the strongest attack on these images at the radius",
        "under the strongest attack on these images, at the radius",
    ):
        assert said in text
    records = read_records([bare])
    none = Report(records, Findings({kind: {} for kind in KINDS}), ReportConfig(checkpoint="last"), {})
    assert nearest_measurement(none, records[0]) is None
    write_measurement(bare, "fab-min", 60, images=100, distances=torch.full((100,), 0.05), search=search)
    records = read_records([bare])
    drawn = nearest_measurement(Report(records, none.found, ReportConfig(checkpoint="last"), {}), records[0])
    assert drawn is not None
    assert drawn.images == 100


def test_the_command_of_the_note_measures_what_was_left_out(bare: Path) -> None:
    from fastdynat.commands.report.report_tables import other_images

    asked = ["--checkpoints", "last", "--quiet", "--num-images"]
    assert main(["eval", str(bare), "--attacks", "clean,fgsm", *asked, "60"]) == 0
    assert main(["eval", str(bare), "--attacks", "clean,pgd3,deepfool-linf5", *asked, "20"]) == 0
    (note,) = other_images(read_records([bare]))
    assert main([*shlex.split(note.command)[1:], "--quiet"]) == 0
    counts = {(m.result.attack, m.result.images) for m in only_checkpoint(bare).measured}
    assert {(name, 60) for name in ("clean", "fgsm", "pgd3", "deepfool-linf5")} <= counts
    (note,) = other_images(read_records([bare]))
    assert note.command == ""


def test_images_that_are_as_many_but_others_do_not_mix(bare: Path) -> None:
    """An image folder and a corrupted copy of it: clean accuracy is lower on one, robust on the other."""
    for digest, clean, pgd in (("aa" * 32, 18, 6), ("bb" * 32, 12, 9)):
        write_measurement(bare, "clean", clean, digest=digest)
        write_measurement(bare, "pgd20", pgd, digest=digest)
    assert shown(bare) in ((0.9, "pgd20", 0.3), (0.6, "pgd20", 0.45))


def test_rows_of_other_images_say_so(trained: Path, bare: Path) -> None:
    from fastdynat.commands.report.report_tables import accuracy_table

    write_measurement(bare, "pgd20", 9, digest="bb" * 32)
    rows = accuracy_table(read_records([bare, trained / "dynat"]))["rows"]
    counts = [{cell["count"] for cell in row["cells"] if cell} for row in rows]
    assert counts == [{"20 images bbbbbbbb"}, {"20 images 0"}]


def test_accuracies_of_the_present_code_replace_older_ones(bare: Path) -> None:
    write_measurement(bare, "clean", 18)
    write_measurement(bare, "pgd20", 2, version="0.0.1+old")
    write_measurement(bare, "pgd20", 9, version=code_version(), pad=None)
    assert shown(bare) == (0.9, "pgd20", 0.45)


L2_ATTACK = """
from dataclasses import dataclass

import torch

from fastdynat.attacks.interface import Nearest


@dataclass(frozen=True)
class Grey:
    norm: str = "l2"

    def __post_init__(self):
        object.__setattr__(self, "norm", "l2")

    def __call__(self, ascent, x, labels, *, generator=None, tick=None):
        x_adv = torch.full_like(x, 0.5)
        distance = (x_adv - x).flatten(1).norm(dim=1)
        found = torch.ones(len(x), dtype=torch.bool)
        return Nearest(x_adv, torch.tensor(0), 0, found=found, distance=distance)
"""


@pytest.mark.parametrize("old", [False, True], ids=["", "a file of an older version"])
def test_an_attack_of_another_norm_is_not_in_the_ball(bare: Path, tmp_path: Path, old: bool) -> None:
    from fastdynat.commands.report.compute import KINDS, Findings
    from fastdynat.commands.report.page import Report, nearest_measurement

    (file := tmp_path / "grey.py").write_text(L2_ATTACK)
    attacks = f"clean,pgd2,{file}:Grey"
    asked = ["--attacks", attacks, "--num-images", "60", "--checkpoints", "last", "--quiet"]
    assert main(["eval", str(bare), *asked]) == 0
    for path in (bare / "evaluations").glob("*.json") if old else ():
        document = json.loads(path.read_text())
        del document["about"]["attack_norm"], document["about"]["attack_eps"]
        path.write_text(json.dumps(document))
    found = {m.result.attack: m for m in only_checkpoint(bare).measured}
    assert {name: (m.norm, m.eps) for name, m in found.items()} == {
        "clean": ("linf", 0.1),
        "pgd2": ("linf", 0.1),
        "grey.py:Grey": ("l2", None),
    }
    assert shown(bare)[1] == "pgd2"
    records = read_records([bare])
    report = Report(records, Findings({kind: {} for kind in KINDS}), ReportConfig(), {})
    assert nearest_measurement(report, records[0]) is None


def test_the_most_robust_epoch_need_not_be_that_of_the_best_checkpoint(bare: Path) -> None:
    """As of natural training, whose best checkpoint has the highest clean accuracy."""
    from fastdynat.commands.report.report_charts import most_robust_index
    from fastdynat.commands.report.report_tables import gap_rows

    rows = [(1, 0.5, 0.3, True), (2, 0.6, 0.45, True), (3, None, None, False), (4, 0.9, 0.2, True)]
    names = ("epoch", "val_clean_acc", "val_pgd10_acc", "best")
    lines = [dict(zip(names, row, strict=True)) | {"train_seconds": 1.0} for row in rows]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_records([bare])
    assert most_robust_index(records[0]) == 1
    (row,) = gap_rows(records)
    assert (row["best_epoch"], row["best"], row["last_epoch"], row["last"]) == (2, "45.0", 4, "20.0")
    assert row["drop"] == "25.0"
    unvalidated = {"epoch": 1, "train_seconds": 1.0, "best": True}
    (bare / "metrics.jsonl").write_text(json.dumps(unvalidated) + "\n")
    assert most_robust_index(read_records([bare])[0]) is None


def test_runs_whose_paths_end_alike_are_told_apart(trained: Path, tmp_path: Path) -> None:
    from fastdynat.commands.report.compute import _Target, _Workshop
    from fastdynat.commands.report.report_tables import accuracy_table

    first, second = sorted(trained.iterdir())
    paths = [tmp_path / folder / "runs" / "x" for folder in ("a", "b")]
    for path, run, correct in zip(paths, (first, second), (9, 11), strict=True):
        shutil.copytree(run, path, symlinks=True)
        shutil.rmtree(path / "evaluations")
        write_measurement(path, "pgd20", correct)
    records = read_records(paths)
    assert [record.name for record in records] == ["a/runs/x", "b/runs/x"]
    assert [row["cells"][0]["value"] for row in accuracy_table(records)["rows"]] == ["45.00", "55.00"]
    shop = _Workshop(ReportConfig(device="cpu", num_images=4))
    for record in records:
        checkpoint = record.checkpoint("last")
        assert checkpoint is not None
        stored = load_file(checkpoint.path)
        own = shop.subject(_Target(record, checkpoint)).network.state_dict()
        assert all(torch.equal(own[name], value) for name, value in stored.items() if name in own)
        assert stored.keys() & own.keys()


def test_names_of_runs_are_as_short_as_they_differ_and_never_equal() -> None:
    def names(*paths: str) -> list[str]:
        found = [Path(path) for path in paths]
        return [_short_name(found, at) for at in range(len(found))]

    assert names("/r/a", "/r/b") == ["a", "b"]
    assert names("/p/r/a", "/q/r/a", "/q/s/a", "/q/b") == ["p/r/a", "q/r/a", "s/a", "b"]
    assert names("/a", "/r/a") == ["/a", "r/a"]
    assert len(set(names("/r/a\n", "/r/a\\n"))) == 2  # the same when escaped


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_has_any_number_of_channels(channels: int) -> None:
    from fastdynat.commands.report import findings

    pixels = torch.rand(channels, 6, 5)
    image = Image.open(BytesIO(base64.b64decode(findings.picture(pixels))))
    shown = pixels if channels == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    assert np.abs(np.asarray(image).transpose(2, 0, 1) / 255 - shown.numpy()).max() <= 0.5 / 255 + 1e-6


def test_a_curve_ends_at_the_largest_distance() -> None:
    from fastdynat.commands.report import findings

    images = ImageSet(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8))
    subject = findings.AttackedNetwork(tiny_cnn().eval(), images, "linf", 0.3, tuple("0123456789"))
    means = findings.Means(torch.device("cpu"), 8, 0, lambda: False, lambda share: None)
    curve = findings.curve(subject, means)
    assert curve["eps"] == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.45, 0.6, 0.9, 1.0])


def test_findings_are_of_a_radius_and_not_of_weights_alone(trained: Path, tmp_path: Path) -> None:
    """Runs that differ in nothing but --eval-eps have the same weights."""
    runs = [shutil.copytree(trained / "dynat", tmp_path / name, symlinks=True) for name in ("narrow", "wide")]
    for sidecar in runs[1].glob("checkpoints/*/model.json"):
        values = json.loads(sidecar.read_text())
        sidecar.write_text(json.dumps(values | {"eval_eps": 2 * values["eval_eps"]}))
    from fastdynat.commands.report.compute import KINDS, Findings, _tasks

    records = read_records(runs)
    found = Findings({kind: {} for kind in KINDS})
    tasks = list(_tasks(records, ReportConfig(), found))
    keys = [json.dumps(task.key, sort_keys=True) for task in tasks]
    assert len(set(keys)) == len(keys) == 2 * len(KINDS)


def test_transfers_from_different_networks_are_different_columns_and_no_margins(
    trained: Path, tmp_path: Path
) -> None:
    from fastdynat.commands.report.report_tables import accuracy_table

    run = shutil.copytree(trained / "dynat", tmp_path / "run", symlinks=True)
    for source, correct in (("aaaaaaaa11", 15), ("bbbbbbbb22", 11)):
        write_measurement(
            run, "transfer-pgd20", correct, source=source, **{"pad": None} if correct == 15 else {}
        )
    heads = [c.radius for c in accuracy_table(read_records([run]))["columns"] if c.attack == "transfer-pgd20"]
    assert sorted(heads) == [
        f"linf 25.5/255, made on weights {source}" for source in ("aaaaaaaa", "bbbbbbbb")
    ]


def test_transfer_is_between_runs_of_one_dataset(trained: Path, written: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained / "dynat", tmp_path / "other", symlinks=True))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("image_size: null", "image_size: 12"))
    out = Path(shutil.copytree(written, tmp_path / "out"))
    page = report(out, *sorted(trained.iterdir()), other, "--no-attacks")
    assert "made on dynat" in page.text
    assert "made on other" not in page.text
    alone = report(tmp_path / "alone", other, "--no-attacks")
    assert "One run alone has no transfer matrix." in alone.text


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: object) -> str:
        assert main(["report", *map(str, argv)]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def test_bad_input_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = trained / "dynat", tmp_path / "out"
    assert "at least one run directory" in refused("--out", out)
    assert "no run at" in refused(run, tmp_path / "nowhere", "--out", out)
    assert "--num-images must be >= 1, got 0" in refused(run, "--out", out, "--num-images", "0")
    assert "best or last" in refused(run, "--out", out, "--checkpoint", "first")
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a)
    )
    assert "pip install 'fastdynat[plots]'" in refused(run, "--out", out)
    assert not out.exists()
    monkeypatch.undo()
    out.mkdir()
    (out / "findings.json").write_text("{}")
    assert "findings.json is not a report's findings" in refused(run, "--out", out)


def test_the_images_are_the_attacked_ones(trained: Path, written: Path) -> None:
    """The page's pictures: within eps of the image; the perturbation is their amplified difference."""
    entries = json.loads((written / "findings.json").read_text())["findings"]
    value = next(e["value"] for e in entries if e["key"]["kind"] == "examples")
    assert len({example["label"] for example in value["examples"]}) == 6
    for example in value["examples"]:
        pixels = {
            name: np.asarray(Image.open(BytesIO(base64.b64decode(png)))).astype(float)
            for name, png in example["pictures"].items()
        }
        delta = pixels["adversarial"] - pixels["image"]
        assert 0 < np.abs(delta).max() <= 255 * 0.1 + 1
        # Both pictures are rounded to whole levels.
        assert np.abs(pixels["perturbation"] - (127.5 + value["gain"] * delta)).max() <= value["gain"] + 1


@pytest.mark.parametrize(
    ("largest", "gain"), [(8 / 255, 15.0), (0.1, 5.0), (0.5, 1.0), (0.003, 160.0), (0.0, 1.0)]
)
def test_amplification_fills_half_of_the_range(largest: float, gain: float) -> None:
    from fastdynat.commands.report.findings import amplification

    assert amplification(torch.tensor([0.0, -largest])) == pytest.approx(gain)
