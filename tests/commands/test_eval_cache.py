"""Cache of `fastdynat eval`: files by key, shards, stages, and the state after an interruption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_run import TINY
from torch import nn

from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.commands.evaluate import cells, columns
from fastdynat.commands.evaluate.measurement_store import Key, Store, read_measurements, search_numbers
from fastdynat.commands.evaluate.tables import accuracy_text
from fastdynat.commands.main import main
from fastdynat.data import load_test
from fastdynat.evaluation import Measurement, measure, staged
from fastdynat.evaluation.outcome import pack_bits, unpack_bits
from fastdynat.evaluation.unit_images import UnitImages
from fastdynat.ops import image_draws
from fastdynat.runs import load_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--method", "madry", "--run-dir", str(run), *TINY, "--epochs", "6"]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, without any evaluation."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attacks that were really made."""
    made: list[str] = []
    original = cells.measure

    def spy(model: Any, images: Any, attack: NamedAttack, **kwargs: Any) -> Measurement:
        made.append(attack.name)
        return original(model, images, attack, **kwargs)

    monkeypatch.setattr(cells, "measure", spy)
    return made


def evaluate(model: object, *flags: object, code: int = 0) -> dict[str, Any]:
    """The --json document of the last checkpoint on 60 images."""
    out = Path(os.environ["EVAL_JSON"])
    argv = ["eval", str(model), "--checkpoints", "last", "--num-images", "60", "--json", str(out)]
    assert main([*argv, *(str(flag) for flag in flags)]) == code
    document: dict[str, Any] = json.loads(out.read_text())
    return document


@pytest.fixture(autouse=True)
def _json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_JSON", str(tmp_path / "e.json"))
    monkeypatch.chdir(tmp_path)


def accuracies(document: dict[str, Any]) -> dict[str, float]:
    (record,) = document["results"]
    return {a["attack"]: a["accuracy"] for a in record["attacks"]}


# Attacks of users' files

SHIFT = """
from dataclasses import dataclass
from fastdynat.attacks import AttackResult

@dataclass(frozen=True)
class Shift:
    eps: float
    norm: str = "linf"

    def __call__(self, ascent, x, labels, *, generator=None, tick=None):
        return (x + self.eps * 0.5).clamp(0, 1)
"""


def test_an_attack_of_a_file_is_made_again_after_an_edit(
    run: Path, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_attack.py"
    file.write_text(SHIFT)
    asked = ("--attacks", f"clean,{file}:Shift,transfer-{file}:Shift", "--source", run)
    first = accuracies(evaluate(run, *asked))
    column = "my_attack.py:Shift"
    assert list(first) == ["clean", column, f"transfer-{column}"]
    assert accuracies(evaluate(run, *asked)) == first
    assert names == list(first)
    file.write_text(SHIFT.replace("0.5", "0.25"))
    evaluate(run, *asked)
    assert names[3:] == [column, f"transfer-{column}"]
    capsys.readouterr()
    file.write_text(SHIFT.replace("class Shift", "class Other"))
    argv = ["eval", str(run), "--json", str(tmp_path / "no.json"), *map(str, asked)]
    assert main(argv) == 2
    assert capsys.readouterr().err.splitlines() == [f"fastdynat: error: {file}:Shift: {file} has no 'Shift'"]
    assert not (tmp_path / "no.json").exists()


def test_a_class_that_was_renamed_keeps_its_stored_name() -> None:
    pgd, mim = (parse_attack(name, eps=0.1, step_size=0.025).search for name in ("pgd2", "mim2"))
    assert [search_numbers(search)["class"] for search in (pgd, mim)] == ["PGD", "MIM"]  # type: ignore[index]


# The files


def a_measurement(images: int = 9, **changes: Any) -> Measurement:
    robust, labels = torch.arange(images) % 3 == 0, torch.arange(images) % 2
    distances = torch.arange(images, dtype=torch.float32).masked_fill(robust, float("inf"))
    made = Measurement.of("pgd2", robust, labels, classes=2, seconds=0.5, batch_size=4, distances=distances)
    return replace(made, **changes)


KEY = Key(
    weights="aa",
    images="bb",
    attack="pgd2",
    search={"class": "PGD", "eps": 0.1},
    seed=1,
    batch_size=500,
    amp="off",
    version="1",
)


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    store, about = Store(tmp_path / "run" / "evaluations", {"run": "r"}), {"run": "r"}
    text, measured = KEY.text(), a_measurement()
    assert text not in store
    assert list(store) == []
    store[text] = asdict(measured)
    other = replace(KEY, seed=2, attack="transfer-pgd2", source="cc").text()
    store[other] = asdict(replace(measured, attack="transfer-pgd2"))
    assert set(store) == {text, other}
    assert len(store) == 2
    assert store[text] == json.loads(json.dumps(asdict(measured))) | {"ci": measured.ci}
    found = read_measurements(tmp_path / "run")
    assert [(key["attack"], key["seed"], a, m.attack) for key, a, m in found] == [
        ("pgd2", 1, about, "pgd2"),
        ("transfer-pgd2", 2, about, "transfer-pgd2"),
    ]
    del store[text]
    assert set(store) == {other}


@pytest.mark.parametrize(
    "damage", ["truncated", "not json", "other format", "edited accuracy", "edited bits", "other key"]
)
def test_a_damaged_file_is_as_good_as_none_and_said(damage: str, tmp_path: Path, messages: list[str]) -> None:
    store = Store(tmp_path / "evaluations", {})
    store[KEY.text()] = asdict(a_measurement())
    path = store.path(KEY.text())
    document = json.loads(path.read_text())
    if damage == "other format":
        document["format"] = "eval/0"
    if damage == "edited accuracy":
        document["measurement"]["accuracy"] = 1.0
    if damage == "edited bits":
        document["measurement"]["robust_bits"] = pack_bits(torch.ones(9, dtype=torch.bool))
    if damage == "other key":
        document["key"]["seed"] = 2
    text = json.dumps(document)
    path.write_text({"truncated": text[:-40], "not json": "\x00"}.get(damage, text))
    assert KEY.text() not in store
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert len(read_measurements(tmp_path)) == (damage == "other key")
    store[KEY.text()] = asdict(a_measurement())
    assert KEY.text() in store


def test_a_folder_that_cannot_be_written_costs_the_file_not_the_result(
    tmp_path: Path, messages: list[str]
) -> None:
    (tmp_path / "evaluations").touch()
    store = Store(tmp_path / "evaluations", {})
    store[KEY.text()] = asdict(a_measurement())
    assert "--cache" in messages[0]
    assert KEY.text() not in store


# Hits and misses


def test_what_was_measured_is_not_measured_again(
    run: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(run, "--attacks", "clean,pgd2")
    assert names == ["clean", "pgd2"]
    assert first["results"][0]["cached"] == []
    capsys.readouterr()
    second = evaluate(run, "--attacks", "clean,pgd2")
    assert names == ["clean", "pgd2"]
    assert second["results"] == [{**first["results"][0], "cached": ["clean", "pgd2"]}]
    assert "--fresh" in capsys.readouterr().out
    evaluate(run, "--attacks", "clean,pgd2,cw2")
    assert names == ["clean", "pgd2", "cw2"]
    again = evaluate(run, "--attacks", "pgd2", "--fresh")
    assert names[3:] == ["pgd2"]
    assert again["results"][0]["attacks"][0]["correct"] == first["results"][0]["attacks"][1]["correct"]
    assert {key["attack"] for key, _, _ in read_measurements(run)} == {"clean", "pgd2", "cw2"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--eps", "0.05"],
        ["--step-size", "0.01"],
        ["--norm", "l2", "--eps", "0.1", "--step-size", "0.025"],
        ["--seed", "2"],
        ["--amp", "bf16"],
        ["--num-images", "59"],
        ["--shard", "1/2"],
        ["--cache", "off"],
        ["--cache", "elsewhere"],
    ],
)
def test_each_part_of_the_key_counts(flags: list[str], run: Path, names: list[str]) -> None:
    evaluate(run, "--attacks", "pgd2")
    evaluate(run, "--attacks", "pgd2", *flags)
    assert names == ["pgd2", "pgd2"]
    evaluate(run, "--attacks", "pgd2", *flags)
    assert names == ["pgd2"] * (3 if flags == ["--cache", "off"] else 2)


def test_a_batch_size_counts_only_where_the_result_depends_on_it(
    run: Path, names: list[str], tmp_path: Path
) -> None:
    (file := tmp_path / "my_attack.py").write_text(SHIFT)
    asked = ("--attacks", f"clean,pgd2,{file}:Shift")
    first = evaluate(run, *asked)
    del names[:]
    second = evaluate(run, *asked, "--batch-size", "7")
    assert names == ["my_attack.py:Shift"]
    assert accuracies(second) == accuracies(first)
    assert accuracies(evaluate(run, *asked, "--batch-size", "7", "--fresh")) == accuracies(first)


def test_results_of_other_random_numbers_are_made_again(
    run: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run, "--attacks", "clean,pgd2")
    monkeypatch.setattr(image_draws, "VERSION", image_draws.VERSION + 1)
    evaluate(run, "--attacks", "clean,pgd2")
    assert names == ["clean", "pgd2"] * 2
    store = Store(run / "evaluations", {})
    for text, stored in list(store.items()):  # as keys were before draws had a version
        key = {name: value for name, value in json.loads(text).items() if name != "draws"}
        store[json.dumps({**key, "batch_size": 500}, sort_keys=True)] = stored
        del store[text]
    evaluate(run, "--attacks", "clean,pgd2")
    assert names == ["clean", "pgd2"] * 3


def test_results_of_other_attack_code_are_made_again(
    run: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run, "--attacks", "clean,pgd2")
    evaluate(run, "--attacks", "clean,pgd2")
    assert names == ["clean", "pgd2"]
    monkeypatch.setattr(cells, "code_version", lambda: "another")
    evaluate(run, "--attacks", "clean,pgd2")
    assert names == ["clean", "pgd2"] * 2


def test_other_weights_and_another_source_are_other_results(
    run: Path, names: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert main(["train", "--method", "natural", "--run-dir", str(other), *TINY, "--epochs", "1"]) == 0
    for model in (run, other):
        evaluate(model, "--attacks", "pgd2", "--cache", "one")
    flags = ("--attacks", "transfer-pgd2", "--cache", "one")
    for source in (run, other / "last" / "model.safetensors", other):
        document = evaluate(run, *flags, "--source", source)
    assert names == ["pgd2", "pgd2", "transfer-pgd2", "transfer-pgd2"]  # one epoch: best is last
    _, images = load_test("digits", None)
    chosen = type(images)(images.images[:60], images.labels[:60])
    model, source_net = (load_network(path / "last" / "model.safetensors")[0] for path in (run, other))
    attack = parse_attack("pgd2", eps=0.1, step_size=0.025)
    expected = measure(model, chosen, attack, device=CPU, batch_size=60, seed=1, source=source_net)
    assert accuracies(document) == {"transfer-pgd2": expected.accuracy}


def test_results_do_not_stand_in_the_way_of_the_run(tmp_path: Path) -> None:
    begin = ["train", "--method", "natural", "--run-dir", str(tmp_path / "run"), *TINY, "--epochs", "2"]
    assert main([*begin, "--stop-after", "1"]) == 0
    evaluate(tmp_path / "run", "--attacks", "clean")
    assert len(read_measurements(tmp_path / "run")) == 1
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    evaluate(tmp_path / "run", "--attacks", "clean")
    assert len(read_measurements(tmp_path / "run")) == 2
    assert main([*begin, "--overwrite"]) == 0
    assert read_measurements(tmp_path / "run") == []


# A stop in the middle


def test_a_stop_between_attacks_keeps_what_is_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, made = cells.measure, []

    def interrupted(model: Any, images: Any, attack: NamedAttack, **kwargs: Any) -> Measurement:
        made.append(attack.name)
        if made == ["clean", "fgsm"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, images, attack, **kwargs)

    monkeypatch.setattr(cells, "measure", interrupted)
    partial = evaluate(run, "--attacks", "clean,fgsm,pgd2", code=143)
    table = capsys.readouterr().out
    assert not partial["complete"]
    assert list(accuracies(partial)) == ["clean"]
    (clean,) = partial["results"][0]["attacks"]
    assert accuracy_text(clean) in table
    assert "the same command goes on" in table
    whole = evaluate(run, "--attacks", "clean,fgsm,pgd2")
    assert made == ["clean", "fgsm", "fgsm", "pgd2"]
    assert whole["complete"]
    assert list(accuracies(whole)) == ["clean", "fgsm", "pgd2"]


def test_ctrl_c_in_a_long_attack(run: Path) -> None:
    flags = ["--checkpoints", "last", "--batch-size", "4", "--attacks", "clean,pgd100"]
    command = [sys.executable, "-u", "-m", "fastdynat", "eval", str(run), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "last: clean" in line
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "stopped: the same command goes on" in out
    accuracy = line.split("clean ")[1].split(" %")[0]
    assert re.search(rf"{accuracy} [±+]", out)
    assert [key["attack"] for key, _, _ in read_measurements(run)] == ["clean"]


# Shards


def test_shards_unite_to_the_whole(run: Path, names: list[str]) -> None:
    flags = ("--attacks", "clean,pgd2-2")
    whole = evaluate(run, *flags, "--cache", "off")["results"][0]
    sizes = [evaluate(run, *flags, "--shard", f"{i}/7")["results"][0]["images"] for i in range(1, 7)]
    assert sizes == [9, 9, 9, 9, 8, 8]
    del names[:]
    evaluate(run, *flags)
    assert names == ["clean", "pgd2-2"]  # one shard is missing
    for path in (run / "evaluations").glob("*.json"):
        if "of7" not in path.name:
            path.unlink()
    seventh = evaluate(run, *flags, "--shard", "7/7")["results"][0]
    assert (seventh["shard"], seventh["images"]) == ("7/7", 8)
    del names[:]
    united = evaluate(run, *flags)["results"][0]
    assert names == []
    assert united["cached"] == ["clean", "pgd2-2"]
    for left, right in zip(whole["attacks"], united["attacks"], strict=True):
        for key in ("attack", "correct", "images", "ci", "per_class", "robust_bits"):
            assert left[key] == right[key], key
        assert left["zero_grad_share"] == pytest.approx(right["zero_grad_share"])
    assert united["worst"] == whole["worst"]


def fake_stages(monkeypatch: pytest.MonkeyPatch) -> list[NamedAttack]:
    """Four deterministic attacks, one after the other, in the place of AutoAttack's."""
    stages = [
        NamedAttack(name, parse_attack("fgsm", eps=eps, step_size=eps).search)
        for name, eps in (("apgd-ce", 0.02), ("apgd-t", 0.04), ("fab-t", 0.03), ("square", 0.08))
    ]
    monkeypatch.setattr(columns, "stages", lambda norm, eps: stages)
    return stages


def attacked(column: dict[str, Any]) -> list[float]:
    """How many images each stage attacked, by its speed."""
    return [stage["images_per_s"] * stage["seconds"] for stage in column["stages"]]


def test_stages_run_on_what_still_stands(
    run: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = fake_stages(monkeypatch)
    (record,) = evaluate(run, "--attacks", "fast-autoattack")["results"]
    assert names == ["clean", *(f"fast-autoattack/{stage.name}" for stage in stages)]
    (column,) = record["attacks"]
    model, _ = load_network(run / "last" / "model.safetensors")
    _, images = load_test("digits", None)
    chosen = type(images)(images.images[:60], images.labels[:60])
    masks = []
    for attack in (NamedAttack("clean"), *stages):
        alone = measure(model, chosen, attack, device=CPU, batch_size=60, seed=1)
        masks.append(unpack_bits(alone.robust_bits, 60))
    left = torch.stack(masks).cummin(0).values
    assert [s["correct"] for s in column["stages"]] == left.sum(1).tolist()
    assert attacked(column) == pytest.approx([60, *left.sum(1).tolist()[:-1]])
    assert column["attack"] == "fast-autoattack"
    assert torch.equal(unpack_bits(column["robust_bits"], 60), left[-1])
    evaluate(run, "--attacks", "fast-autoattack")
    assert len(names) == 5


def test_stages_go_on_after_a_stop_and_unite_over_shards(
    run: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_stages(monkeypatch)
    whole = evaluate(run, "--attacks", "fast-autoattack", "--cache", "off")["results"][0]["attacks"][0]
    original = cells.measure

    def killed(model: Any, images: Any, attack: NamedAttack, **kwargs: Any) -> Measurement:
        if attack.name.endswith("apgd-t") and "fast-autoattack/apgd-t" not in names:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, images, attack, **kwargs)

    monkeypatch.setattr(cells, "measure", killed)
    flags = ("--attacks", "fast-autoattack", "--batch-size", "15")
    del names[:]
    evaluate(run, *flags, "--shard", "1/2", code=143)
    assert names == ["clean", "fast-autoattack/apgd-ce", "fast-autoattack/apgd-t"]
    for shard in ("1/2", "2/2"):
        evaluate(run, *flags, "--shard", shard)
    assert names[3:5] == ["fast-autoattack/apgd-t", "fast-autoattack/fab-t"]
    del names[:]
    united = evaluate(run, *flags)["results"][0]["attacks"][0]
    assert names == []
    assert united["robust_bits"] == whole["robust_bits"]
    assert [s["correct"] for s in united["stages"]] == [s["correct"] for s in whole["stages"]]
    assert attacked(united) == pytest.approx(attacked(whole))


# The reference package


def fake_reference(monkeypatch: pytest.MonkeyPatch, seen: list[dict[str, Any]]) -> None:
    """`run_reference` that asks the network once and calls every second image broken."""

    def run_reference(model: nn.Module, images: UnitImages, y: torch.Tensor, **kwargs: Any) -> Any:
        x = images[torch.arange(len(images))]
        assert x.dtype == torch.float32
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        kwargs["state_path"].write_text("begun")
        seen.append(kwargs)
        robust = (model(x).argmax(1) == y) & (torch.arange(len(y)) % 2 == 0)
        return robust, {"apgd-ce": 1.5, "square": 2.0}

    monkeypatch.setattr(cells, "run_reference", run_reference)
    monkeypatch.setattr(columns, "require_reference", lambda norm: None)  # the package is an extra


def test_the_reference_package_is_a_column_like_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    fake_reference(monkeypatch, seen)
    (record,) = evaluate(run, "--attacks", "clean,autoattack", "--batch-size", "7")["results"]
    clean, reference = record["attacks"]
    every_second = unpack_bits(clean["robust_bits"], 60) & (torch.arange(60) % 2 == 0)
    assert torch.equal(unpack_bits(reference["robust_bits"], 60), every_second)
    assert reference["seconds"] == 3.5
    asked = seen[0]
    assert (asked["norm"], asked["eps"], asked["seed"], asked["batch_size"], asked["version"]) == (
        "linf",
        0.1,
        1,
        7,
        "standard",
    )
    assert asked["state_path"].parent == run / "evaluations"
    assert not asked["state_path"].exists()  # finished
    evaluate(run, "--attacks", "clean,autoattack", "--batch-size", "7")
    assert len(seen) == 1


def test_the_reference_package_may_find_nothing_to_attack(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no image is classified correctly: its stages take no time."""

    def run_reference(model: nn.Module, images: UnitImages, y: torch.Tensor, **kwargs: Any) -> Any:
        clean = torch.zeros(len(y), dtype=torch.bool)
        progress = staged.begin({}, clean, 0)
        stages = ("apgd-ce", "square")
        staged.run_stages(refuse, refuse, images, y, progress, stages, 7, None, lambda *done: None)
        return clean, progress.seconds

    def refuse(*args: object) -> Any:
        raise AssertionError("there is nothing to attack")

    fake_reference(monkeypatch, [])
    monkeypatch.setattr(cells, "run_reference", run_reference)
    for _ in range(2):
        (record,) = evaluate(run, "--attacks", "autoattack")["results"]
        (found,) = record["attacks"]
        assert (found["accuracy"], found["seconds"], found["images_per_s"]) == (0, 0, 0)


def test_a_stop_inside_the_reference_keeps_its_state(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    fake_reference(monkeypatch, seen)
    forward = cells.Watched.forward

    def stopping(self: cells.Watched, x: torch.Tensor) -> torch.Tensor:
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(cells.Watched, "forward", stopping)
    partial = evaluate(run, "--attacks", "clean,autoattack", code=130)
    assert list(accuracies(partial)) == ["clean"]
    assert seen[0]["state_path"].read_text() == "begun"
    evaluate(run, "--attacks", "clean,autoattack")
    assert seen[1]["state_path"] == seen[0]["state_path"]


def test_where_nothing_can_be_written_the_reference_runs_all_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_reference(model: nn.Module, images: UnitImages, y: torch.Tensor, **kwargs: Any) -> Any:
        assert kwargs["state_path"] is None
        return torch.zeros(len(y), dtype=torch.bool), {"apgd-ce": 1.0}

    monkeypatch.setattr(cells, "run_reference", run_reference)
    monkeypatch.setattr(columns, "require_reference", lambda norm: None)
    (tmp_path / "file").write_text("")
    (record,) = evaluate(run, "--attacks", "autoattack", "--cache", tmp_path / "file")["results"]
    assert record["attacks"][0]["accuracy"] == 0
    assert "would start over after an interruption; use --cache DIR" in capsys.readouterr().out
