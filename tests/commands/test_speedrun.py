"""`fastdynat speedrun`: the clock, the rules, the order of laps, and what a stopped race keeps."""

import io
import json
import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fastdynat import freed_memory
from fastdynat.commands import main as main_module
from fastdynat.commands.main import main
from fastdynat.commands.speedrun import lap as lap_module
from fastdynat.commands.speedrun import race_rules, run_race
from fastdynat.commands.speedrun.lap import Lap, lap_command, lap_environment, lap_program, run_lap
from fastdynat.commands.speedrun.lap_judge import LapJudge, sample_rows
from fastdynat.commands.speedrun.plain_loop import crop_and_flip, train_plainly
from fastdynat.commands.speedrun.race_log import HEADER, log_table, machine_text
from fastdynat.commands.speedrun.race_results import MACHINE as MACHINE_KEYS
from fastdynat.commands.speedrun.race_results import Identity, read_result, result_document
from fastdynat.commands.speedrun.race_rules import PlainSettings, broken_rules
from fastdynat.commands.speedrun.record_definition import (
    RecordDefinition,
    definition_names,
    earlier_records,
    newest_definition,
    read_definition,
)
from fastdynat.commands.speedrun.shown_log import show_log
from fastdynat.errors import UserError
from fastdynat.models import build_model
from fastdynat.terminal.consoles import error_console
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training.step import TrainStep

ROOT = Path(__file__).parents[2]
FLAGS: dict[str, Any] = {
    **{"method": "madry", "model": "small", "augment": "crop-flip", "eps": "8/255", "step_size": "2/255"},
    **{
        "steps": 1,
        "epochs": 2,
        "batch_size": 64,
        "channels_last": "off",
        "kernels": "eager",
        "winograd": "off",
    },
}
TINY = RecordDefinition(
    name="tiny",
    about="tiny",
    date="2026-11-29",
    track="cpu-2",
    target=0.3,
    against=None,
    changed="Tiny.",
    algorithm="",
    loop="fastdynat",
    train=FLAGS,
)
MACHINE = lap_environment("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of ten classes: 120 training images, 10 test images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 1)):
        for kind in range(10):
            (folder / split / f"k{kind}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"k{kind}" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_race, "own_cores", lambda: 2)


def a_lap(images: Path, run_dir: Path, **changes: Any) -> Lap:
    values = {"record": "tiny", "loop": "fastdynat", "train": FLAGS, "seed": 0, "data": "imagefolder"}
    where = {"data_dir": str(images), "device": "cpu", "run_dir": str(run_dir), "quiet": True}
    return Lap(**{**values, **where, **changes})


def judged(pgd20: float = 0.31, gap: float = 0.03, **changes: Any) -> dict[str, Any]:
    """A finished lap of seed 0 that the rules allow."""
    share = {"ci": [0.0, 1.0], "correct": 1, "seconds": 1.0, "batch_size": 500}
    return {
        "seed": 0,
        "folder": "tiny-seed0",
        **{
            "seconds": 10.0,
            "cpu_seconds": 19.0,
            "preparation_seconds": 1.0,
            "first_update_seconds": 0.5,
            "epoch_seconds": [8.0],
        },
        **{
            "reading_seconds": 2.0,
            "train_images": 50_000,
            "train_sha256": "f" * 64,
            "weights": "model.safetensors",
            "load_average": 0.0,
        },
        "environment": {**MACHINE, "threads": 2},
        "test": {
            **{"images": 10_000, "classes": 10, "sha256": "0" * 64},
            **{"clean": {"accuracy": 0.6, **share}, "pgd20": {"accuracy": pgd20, **share}},
        },
        "sample": {
            "images": 1000,
            "pgd20": pgd20,
            "autoattack": {"accuracy": pgd20 - gap, **share},
            "gap": gap,
        },
        "masking": [{"name": "loss", "passed": True, "evidence": "", "remedy": ""}],
        **changes,
    }


def three(**changes: Any) -> list[dict[str, Any]]:
    return [judged(seed=seed, **changes) for seed in range(3)]


# Definitions


@pytest.mark.parametrize("name", definition_names())
def test_every_definition_can_be_raced(name: str) -> None:
    record = read_definition(name)
    assert record.name == name
    assert record.against is None or record.against in definition_names()
    assert record.track.replace("-", "") == name.partition("-")[0]
    assert record.changed.endswith(".")
    assert not record.algorithm or record.algorithm.endswith(".")


def test_every_track_has_a_newest_record() -> None:
    found = {track: newest_definition(track) for track in ("cpu-2", "gpu-1")}
    assert {track: record.track for track, record in found.items()} == {"cpu-2": "cpu-2", "gpu-1": "gpu-1"}
    records = {name: read_definition(name) for name in definition_names()}
    newest = found["cpu-2"]
    rivals = [r for r in records.values() if (r.track, r.target) == ("cpu-2", 0.3)]
    assert newest in rivals
    assert newest.date == max(r.date for r in rivals)
    of_that_day = [r for r in rivals if r.date == newest.date]
    longest = max(earlier_records(r, records) for r in of_that_day)
    last = [r for r in of_that_day if earlier_records(r, records) == longest]
    assert newest in last
    assert newest.train["amp"] == "off" or all(r.train["amp"] != "off" for r in last)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "records").glob("*.json")), ids=lambda path: path.stem
)
def test_a_stored_result_is_that_of_its_definition(path: Path) -> None:
    result = read_result(path)
    assert result.name == path.stem
    expected = json.loads(json.dumps(asdict(read_definition(path.stem))))
    assert {"predicted": expected["predicted"]} | result.definition == expected  # older than the key
    assert result.reasons == broken_rules(result.definition["track"], result.target, result.laps)
    assert "-dirty" not in result.commit


BAD_LINES = [
    ("target: 1.3", "target must be a share in (0, 1]"),
    ("target: half", "target"),
    ("date: tomorrow", "date must be YYYY-MM-DD"),
    ("track: cpu-4", "track"),
    ("colour: red", "unknown key 'colour'"),
    ("train: {method: madry}", "lacks train.epochs"),
    ("train: {epochs: 3}", "lacks train.method"),
    ("train: {method: madry, epochs: 3, val_size: 0}", "val_size is set by the race"),
    ("train: {method: madry, epochs: 3, seed: 1}", "seed is set by the race"),
    ("train: {method: madry, epochs: 3, init_from: runs/a}", "init_from is against the rules"),
    ("train: {method: madry, epochs: 3, stop_at: 0.3}", "stop_at is against the rules"),
    ("train: {method: madry, epochs: 3, on_collapse: stop}", "on_collapse is against the rules"),
    ("train: {method: madry, epochs: 3, extra_data: 1m.npz}", "extra_data is against the rules"),
    ("train: {method: madry, epochs: 3, epsilon: 8/255}", "unknown key 'epsilon'"),
    ("train: {method: madry, epochs: 0}", "epochs must be >= 1"),
    ("train: {method: madry, epochs: 3, logit_scale: 0.5}", "logit_scale 0.5 is against the rules"),
    ("train: {method: mardy, epochs: 3}", "did you mean 'madry'"),
    ("loop: plain", "unknown key 'augment'"),
    ("{loop: plain, train: {epochs: 0}}", "epochs and batch_size must be at least 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_definition_against_the_rules_is_refused(tmp_path: Path, line: str, message: str) -> None:
    import yaml

    values = {key: value for key, value in asdict(TINY).items() if key != "name"}
    values |= yaml.safe_load(line)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**values, "date": str(values["date"])}))
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        read_definition(str(file))
    assert "\n" not in str(refused.value)


REFUSED = [
    (["--record", "cpu2-marry"], "did you mean 'cpu2-madry'"),
    (["--record", "cpu2-madry,cpu2-madry"], "named twice"),
    (["--record", "cpu2-madry,"], "empty name"),
    (["--record", "nowhere.yaml"], "nowhere.yaml"),
    (["--record", "cpu2-madry,gpu1-fgsm-rs"], "race each track by itself"),
    (["--record", "cpu2-madry", "--track", "gpu-1"], "is of track cpu-2, not gpu-1"),
    (["--target", "30"], "target must be a share in (0, 1], got 30; write 30 % as 0.30"),
    (["--seeds", "0"], "seeds must be >= 1"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_wrong_names_and_values_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speedrun", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_track_of_a_gpu_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speedrun", "--track", "gpu-1"]) == 2
    assert "track gpu-1 needs an H100 or H200, and there is no CUDA GPU here" in capsys.readouterr().err


def test_the_track_of_two_cores_has_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_race, "own_cores", lambda: 16)
    assert main(["speedrun", "--record", "cpu2-madry"]) == 2
    assert "this process may use 16: taskset -c 0,1" in capsys.readouterr().err


def test_the_baseline_needs_its_attack_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_race.importlib.util, "find_spec", lambda name: None)
    assert main(["speedrun", "--record", "cpu2-plain-madry"]) == 2
    assert "pip install 'fastdynat[peer]'" in capsys.readouterr().err


# Rules


def test_a_record_that_keeps_to_the_rules_counts() -> None:
    assert broken_rules("cpu-2", 0.31, three()) == []


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"pgd20": 0.299}, "target missed: PGD-20 29.90 % on average, not 30 %"),
    ({"gap": 0.041}, "seed 2: AutoAttack is 4.1 points under PGD-20 on 1000 images; 4 are allowed"),
    ({"sample": None, "masking": None}, "seed 0: AutoAttack and the masking checks were left out (--quick)"),
    ({"masking": [{"name": "loss", "passed": False}]}, "seed 1: masking check: loss"),
    ({"environment": {**MACHINE, "threads": 4}}, "seed 0: 4 threads; track cpu-2 has 2 cores"),
    ({"train_images": 60_000}, "seed 0: 60,000 training images are not CIFAR-10's 50,000"),
]


@pytest.mark.parametrize(("changes", "reason"), BROKEN)
def test_a_broken_rule_is_named(changes: dict[str, Any], reason: str) -> None:
    assert reason in broken_rules("cpu-2", 0.30, three(**changes))


def test_the_limits_themselves_are_allowed() -> None:
    assert broken_rules("cpu-2", 0.30, three(pgd20=0.30, gap=0.04)) == []


def test_a_target_below_the_tracks_does_not_count() -> None:
    reason = "target 29 % is below the 30 % of track cpu-2"
    assert broken_rules("cpu-2", 0.29, three()) == [reason]


def test_the_mean_of_all_seeds_has_to_reach_the_target() -> None:
    laps = [judged(share, seed=seed) for seed, share in enumerate((0.29, 0.30, 0.31))]
    assert broken_rules("cpu-2", 0.30, laps) == []
    assert broken_rules("cpu-2", 0.3001, laps) == ["target missed: PGD-20 30.00 % on average, not 30.01 %"]


def test_seeds_cannot_be_added_until_the_mean_reaches_the_target() -> None:
    laps = [judged(share, seed=seed) for seed, share in enumerate((0.295, 0.299, 0.300, 0.32))]
    reason = "target missed: PGD-20 29.80 % on average over seeds 0 to 2, not 30 %"
    assert broken_rules("cpu-2", 0.30, laps) == [reason]
    assert broken_rules("cpu-2", 0.30, [*three(pgd20=0.30), judged(0.30, seed=3)]) == []
    worse = [*three(pgd20=0.304), judged(0.2, seed=3)]  # nor does a bad seed drop out
    assert broken_rules("cpu-2", 0.30, worse) == ["target missed: PGD-20 27.80 % on average, not 30 %"]


def test_a_change_that_is_in_no_commit_does_not_count() -> None:
    document = result_document(
        TINY, three(), target=None, own=identity(commit="c" * 40 + "-dirty"), command="", alongside={}
    )
    assert not document["counts"]
    assert document["reasons"] == [
        "the checkout had changes that are in no commit; commit them and race again"
    ]


@pytest.mark.parametrize("kind", ["test", "training"])
def test_all_seeds_have_the_same_images(kind: str) -> None:
    laps = three()
    if kind == "test":
        laps[2]["test"]["sha256"] = "1" * 64
    else:
        laps[2]["train_sha256"] = "1" * 64
    assert broken_rules("cpu-2", 0.30, laps) == [f"the laps do not have the same {kind} images"]


def test_seeds_images_and_the_gpu_are_looked_at() -> None:
    assert broken_rules("cpu-2", 0.30, three()[:2]) == ["2 of 3 seeds are finished"]
    few = judged()
    few["test"]["images"] = 9_999
    assert "seed 0: 9999 test images of 10 classes are not CIFAR-10's" in broken_rules(
        "cpu-2", 0.30, [few] * 3
    )
    on_gpu = {**MACHINE, "threads": 64, "gpus": ["NVIDIA H200"]}
    assert broken_rules("gpu-1", 0.50, three(environment=on_gpu, pgd20=0.5)) == []


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 NVL", True),
        ("NVIDIA L4", False),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
        ("NVIDIA H200 MIG 3g.71gb", False),
        ("NVIDIA H1000", False),
    ],
)
def test_the_track_of_a_gpu_is_for_a_whole_h100_or_h200(name: str, allowed: bool) -> None:
    laps = three(environment={**MACHINE, "threads": 64, "gpus": [name]}, pgd20=0.5)
    found = [f"seed {i}: track gpu-1 is for one whole H100 or H200, not for ['{name}']" for i in range(3)]
    assert broken_rules("gpu-1", 0.50, laps) == ([] if allowed else found)


def test_the_sample_has_every_class_alike() -> None:
    labels = torch.arange(10_000) % 10
    rows = sample_rows(labels)
    assert labels[rows].bincount().tolist() == [100] * 10
    assert torch.equal(rows, sample_rows(labels))
    assert torch.equal(sample_rows(labels[:40]), torch.arange(40))


# Clock


def test_the_clock_covers_first_batch_to_last_update_and_not_the_reading(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, open_split = TrainStep.__call__, lap_module.open_split
    calls = []

    def slow_update(self: TrainStep, batch: Any) -> Any:
        calls.append(time.perf_counter())
        time.sleep(0.1)
        return update(self, batch)

    def slow_opening(config: Any) -> Any:
        time.sleep(0.4)
        return open_split(config)

    monkeypatch.setattr(TrainStep, "__call__", slow_update)
    monkeypatch.setattr(lap_module, "open_split", slow_opening)
    begin = time.perf_counter()
    found = run_lap(a_lap(images, tmp_path / "run"))
    wall = time.perf_counter() - begin
    assert not isinstance(found, int)
    assert len(calls) == 4  # 120 images in batches of 64, twice
    assert found.seconds >= found.preparation_seconds + sum(found.epoch_seconds) >= 0.4
    assert found.first_update_seconds >= 0.1
    assert found.reading_seconds >= 0.4
    assert 0 < found.cpu_seconds < found.seconds * MACHINE["threads"]  # it slept
    assert found.seconds + found.reading_seconds <= wall
    assert found.seconds >= calls[-1] + 0.1 - calls[0]
    assert (found.train_images, len(found.epoch_seconds)) == (120, 2)


def test_a_lap_trains_what_its_flags_say(images: Path, tmp_path: Path) -> None:
    found = run_lap(a_lap(images, tmp_path / "lap", seed=2))
    assert not isinstance(found, int)
    words = [f"--{key.replace('_', '-')}={value}" for key, value in FLAGS.items()]
    own = ["--data", "imagefolder", "--data-dir", str(images), "--val-size", "0", "--seed", "2", "--quiet"]
    assert main(["train", *words, *own, "--run-dir", str(tmp_path / "train")]) == 0
    ours, theirs = (
        load_file(path)
        for path in (tmp_path / "lap" / found.weights, tmp_path / "train" / "last" / "model.safetensors")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# Plain loop


def test_crops_and_flips_are_those_of_the_padded_image() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 6)
    padded = F.pad(x, (4, 4, 4, 4))
    seen = set()
    for i, image in enumerate(crop_and_flip(x)):
        found = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            for crop in (padded[i, :, top : top + 8, left : left + 6],)
            if torch.equal(image, crop.flip(2) if mirrored else crop)
        ]
        assert found
        seen.add(found[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


@pytest.mark.peer
@needs("torchattacks")
def test_the_plain_loop_is_madrys(monkeypatch: pytest.MonkeyPatch) -> None:
    """One update without augmentation, against PGD and SGD written out."""
    from fastdynat.commands.speedrun import plain_loop

    monkeypatch.setattr(plain_loop, "crop_and_flip", lambda x: x)
    x, y = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
    settings = PlainSettings(epochs=1, batch_size=8, lr=0.1, weight_decay=5e-4, milestones=())
    said: list[str] = []
    run = train_plainly(x, y, 4, settings, 3, "cpu", said.append)
    assert [line.split()[1] for line in said] == [
        f"{n}/{settings.epochs}" for n in range(1, settings.epochs + 1)
    ]
    torch.manual_seed(3)
    model = build_model("small", num_classes=4, image_shape=(3, 32, 32))
    rows = torch.randperm(8)
    x, y = x[rows], y[rows]
    adv = (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
    model.eval()
    for _ in range(10):
        adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        moved = adv.detach() + 2 / 255 * gradient.sign()
        adv = (x + (moved - x).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
    model.train()
    F.cross_entropy(model(adv), y).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * (weight.grad + 5e-4 * weight)
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    assert not run.model.training
    assert len(run.epoch_seconds) == 1
    assert 0 < run.first_update_seconds <= run.epoch_seconds[0]


# Race


class Fakes:
    """Laps and verdicts in place of trainings; `laps` is the order in which they ran."""

    def __init__(self, patch: pytest.MonkeyPatch, pgd20: float = 0.31) -> None:
        self.laps: list[tuple[str, int]] = []
        self.judged: list[bool] = []
        self.pgd20 = pgd20
        patch.setattr(run_race, "_timed_in_child", self.timed)
        patch.setattr(LapJudge, "judge", self.judge)
        patch.setattr(run_race, "source_commit", lambda: "c" * 40)
        patch.setattr(run_race, "pixel_digest", lambda images: "0" * 64)
        patch.setattr(run_race, "lap_environment", lambda device: {**MACHINE, "threads": 2})

    def timed(self, lap: Lap, outcome: Path, lock: int) -> dict[str, Any]:
        os.fstat(lock)  # of the open lock file
        self.laps.append((lap.record, lap.seed))
        keys = (
            *(
                "seconds",
                "cpu_seconds",
                "preparation_seconds",
                "first_update_seconds",
                "epoch_seconds",
                "reading_seconds",
            ),
            *("train_images", "train_sha256", "weights", "environment", "load_average"),
        )
        found = {key: judged()[key] for key in keys}
        return found | {"seconds": 100.0 if lap.record == "slow" else 10.0 + lap.seed}

    def judge(self, weights: Path, kept: Path, *, quick: bool) -> dict[str, Any]:
        self.judged.append(quick)
        found = {key: judged(self.pgd20)[key] for key in ("test", "sample", "masking")}
        return found | ({"sample": None, "masking": None} if quick else {})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def write(folder: Path, **changes: Any) -> Path:
    """The definition `TINY` with `changes` as a file."""
    record = replace(TINY, **changes)
    path = folder / f"{record.name}.yaml"
    path.write_text(json.dumps({key: value for key, value in asdict(record).items() if key != "name"}))
    return path


def race(images: Path, out: Path, *records: Path, flags: tuple[str, ...] = ()) -> int:
    where = ["--data", "imagefolder", "--data-dir", str(images), "--out", str(out), "--quiet"]
    return main(["speedrun", "--record", ",".join(map(str, records)), *where, *flags])


def test_records_take_turns_and_count(
    images: Path, tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = write(tmp_path, name="slow"), write(tmp_path, name="fast")
    assert race(images, tmp_path / "out", slow, fast) == 0
    assert fakes.laps == [(name, seed) for seed in range(3) for name in ("slow", "fast")]
    found = read_result(tmp_path / "out" / "fast.json")
    assert (found.counts, found.reasons, found.raced) == (True, [], ["slow", "fast"])
    assert found.alongside == {"slow": [100.0] * 3}
    assert (found.summary["seconds"], found.summary["seconds_range"]) == (11.0, [10.0, 12.0])
    assert found.summary["pgd20"] == 0.31
    assert found.command == (
        "fastdynat speedrun --record slow.yaml,fast.yaml --seeds 3 "
        f"--data imagefolder --data-dir {images.name}"
    )
    assert found.data == "CIFAR-10 (PNG)"
    assert "11.0 (10.0 to 12.0)" in capsys.readouterr().out


def test_a_missed_target_is_said_and_ends_with_1(
    images: Path, tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert race(images, tmp_path / "out", write(tmp_path), flags=("--target", "0.35")) == 1
    said = capsys.readouterr()
    assert "tiny does not count: target missed: PGD-20 31.00 % on average, not 35 %" in said.err
    stored = read_result(tmp_path / "out" / "tiny.json")
    assert (stored.counts, stored.target) == (False, 0.35)
    # The laps are kept: a target is only a question about them.
    assert race(images, tmp_path / "out", tmp_path / "tiny.yaml") == 0
    assert len(fakes.laps) == 3


def test_a_stopped_race_goes_on(
    images: Path, tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write(tmp_path, name="a"), write(tmp_path, name="b")

    def stopped(*args: Any, **flags: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LapJudge, "judge", stopped)
        assert race(images, tmp_path / "out", a, b) == 130
    assert fakes.laps == [("a", 0)]
    assert race(images, tmp_path / "out", a, b, flags=("--seeds", "1")) == 1  # three are needed
    assert fakes.laps == [
        ("a", 0),
        ("b", 0),
    ]  # the training of the first was finished, its evaluation was not
    assert race(images, tmp_path / "out", a, b) == 0
    assert fakes.laps[2:] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("source_commit", f"went from commit {'c' * 40} to {'d' * 40} during the race"),
        ("package_digest", "the code changed during the race"),
    ],
)
def test_a_race_ends_where_its_code_changes(
    images: Path,
    tmp_path: Path,
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    record = write(tmp_path)
    monkeypatch.setattr(run_race, "package_digest", lambda **how: "c" * 40)
    with monkeypatch.context() as patch:
        patch.setattr(run_race, name, lambda **how: "cd"[len(fakes.laps) > 0] * 40)
        assert race(images, tmp_path / "out", record) == 2
    assert message in capsys.readouterr().err
    assert fakes.laps == [("tiny", 0)]
    assert race(images, tmp_path / "out", record) == 0
    assert fakes.laps == [("tiny", 0), ("tiny", 1), ("tiny", 2)]


def test_a_finished_race_run_again_keeps_its_date_and_command(
    images: Path, tmp_path: Path, fakes: Fakes
) -> None:
    record, file = write(tmp_path), tmp_path / "out" / "tiny.json"
    assert race(images, tmp_path / "out", record) == 0
    before = json.loads(file.read_text()) | {"date": "2026-01-02", "command": "as it was"}
    file.write_text(json.dumps(before))
    assert race(images, tmp_path / "out", record, flags=("--seeds", "1")) == 0
    assert json.loads(file.read_text()) == before
    assert race(images, tmp_path / "out", record, flags=("--target", "0.31")) == 0
    assert "--target" in read_result(file).command


def test_a_quick_result_is_completed_later(images: Path, tmp_path: Path, fakes: Fakes) -> None:
    record = write(tmp_path)
    assert race(images, tmp_path / "out", record, flags=("--quick",)) == 1
    found = read_result(tmp_path / "out" / "tiny.json")
    assert found.reasons[0] == "seed 0: AutoAttack and the masking checks were left out (--quick)"
    assert found.summary["sample_autoattack"] is None
    assert race(images, tmp_path / "out", record, flags=("--quick",)) == 1
    assert fakes.judged == [True] * 3
    assert race(images, tmp_path / "out", record) == 0
    assert fakes.judged == [True] * 3 + [False] * 3
    assert len(fakes.laps) == 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("definition", "the definition"),
        ("commit", "the commit"),
        ("machine", "the machine, its threads or torch"),
        ("records", "the list of records"),
        ("code", "the code"),
        ("network", "the code"),
        ("images", "the set of test images"),
    ],
)
def test_a_race_does_not_go_on_as_another(
    images: Path,
    tmp_path: Path,
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    what: str,
) -> None:
    network = tmp_path / "net.py"
    network.write_text("1")
    own = {"model": f"{network}:net"} if change == "network" else {}
    record = write(tmp_path, train={**FLAGS, **own})
    assert race(images, tmp_path / "out", record, flags=("--seeds", "1")) == 1
    records = [record]
    if change == "definition":
        write(tmp_path, train={**FLAGS, "lr": 0.2})
    elif change == "commit":
        monkeypatch.setattr(run_race, "source_commit", lambda: "d" * 40)
    elif change == "machine":
        monkeypatch.setattr(run_race, "lap_environment", lambda device: {**MACHINE, "threads": 1})
    elif change == "code":
        monkeypatch.setattr(run_race, "package_digest", lambda *, compiled: "another")
    elif change == "network":
        network.write_text("2")
    elif change == "images":
        monkeypatch.setattr(run_race, "pixel_digest", lambda images: "1" * 64)
    else:
        records.append(write(tmp_path, name="other"))
    capsys.readouterr()
    before = (tmp_path / "out" / "tiny.json").read_bytes()
    assert race(images, tmp_path / "out", *records) == 2
    said = capsys.readouterr().err
    assert f"{what} has changed since this race began" in said
    assert "choose another --out" in said
    assert fakes.laps == [("tiny", 0)]
    assert (tmp_path / "out" / "tiny.json").read_bytes() == before


def test_a_whole_race_on_tiny_data(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in its own process, evaluated by the real judge, and not measured twice."""
    out, record = tmp_path / "out", write(tmp_path, target=0.01)
    assert race(images, out, record, flags=("--seeds", "1")) == 1
    (lap,) = read_result(out / "tiny.json").laps
    assert lap["test"]["images"] == lap["sample"]["images"] == 10
    assert len(lap["masking"]) == 8
    assert lap["sample"]["gap"] == pytest.approx(
        lap["sample"]["pgd20"] - lap["sample"]["autoattack"]["accuracy"]
    )
    assert lap["seconds"] >= sum(lap["epoch_seconds"]) > 0
    said = capsys.readouterr().err
    assert "tiny does not count: seed 0: 10 test images of 10 classes are not CIFAR-10's" in said
    monkeypatch.setattr(run_race, "_timed_in_child", None)
    assert race(images, out, record, flags=("--seeds", "1")) == 1


def test_a_network_from_the_users_file_is_raced_and_judged(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account knows the file by the race alone: the lap's own cache is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n\n\ndef net(num_classes: int) -> nn.Module:\n"
        "    layers = nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(256, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    record = write(tmp_path, train={**FLAGS, "model": f"{code}:net"})
    assert race(images, tmp_path / "out", record, flags=("--seeds", "1", "--quick")) == 1
    (lap,) = read_result(tmp_path / "out" / "tiny.json").laps
    assert lap["test"]["images"] == 10


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("start", ["lap", "train"])
def test_a_lap_keeps_freed_memory_where_the_command_line_does(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, start: str
) -> None:
    def keep() -> bool:  # without its effect on this process
        monkeypatch.setattr(freed_memory, "_kept", True)
        return True

    monkeypatch.setattr(freed_memory, "keep_freed_memory", keep)
    monkeypatch.setattr(freed_memory, "_kept", False)
    monkeypatch.setattr(freed_memory, "NVIDIA", tmp_path if gpu else tmp_path / "nothing")
    if start == "train":
        monkeypatch.setattr(main_module, "main", lambda: 0)
        main_module.program()
        assert freed_memory.freed_memory_is_kept() is not gpu
        return
    outcome = tmp_path / "outcome.json"
    train = {**FLAGS, "epochs": 1}
    lap = a_lap(images, tmp_path / "run", train=train)
    assert lap_program([json.dumps(asdict(lap)), str(outcome)]) == 0
    assert json.loads(outcome.read_text())["environment"]["keeps_freed_memory"] is not gpu


def test_what_could_make_a_lap_faster_is_kept_out_or_recorded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def started(words: list[str], *, env: dict[str, str], **rest: Any) -> Any:
        seen.append(env)
        Path(words[-1]).write_text('{"seconds": 1.0}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run_race.subprocess, "run", started)
    monkeypatch.setenv("FASTDYNAT_KERNELS", "eager")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    run_race._timed_in_child(a_lap(images, tmp_path / "run"), tmp_path / "lap.json", 0)
    assert "FASTDYNAT_KERNELS" not in seen[0]
    assert seen[0]["SOMETHING_ELSE"] == "1"
    monkeypatch.setenv("LD_PRELOAD", "/home/me/libjemalloc.so.2:libother.so /x/third.so")
    assert lap_environment("cpu")["preloaded"] == ["libjemalloc.so.2", "libother.so", "third.so"]
    monkeypatch.delenv("LD_PRELOAD")
    assert lap_environment("cpu")["preloaded"] == []


def test_a_lap_that_cannot_run_says_why(images: Path, tmp_path: Path) -> None:
    lap = a_lap(images, tmp_path / "run", train={**FLAGS, "model": "resnet81"})
    assert lap_command([json.dumps(asdict(lap)), str(tmp_path / "outcome")]) == 2
    assert "resnet81" in json.loads((tmp_path / "outcome").read_text())["error"]


@pytest.mark.peer
@needs("torchattacks")
def test_the_baseline_is_judged_like_the_others(images: Path, tmp_path: Path) -> None:
    lap = a_lap(images, tmp_path / "run", loop="plain", train={"epochs": 2, "batch_size": 64})
    found = run_lap(lap)
    assert not isinstance(found, int)
    assert found.seconds >= sum(found.epoch_seconds) > 0
    judge = LapJudge("imagefolder", str(images), "cpu", {}, ProgressDisplay(error_console(), quiet=True))
    verdict = judge.judge(tmp_path / "run" / found.weights, tmp_path / "kept", quick=True)
    assert verdict["test"]["images"] == 10
    assert verdict["test"]["pgd20"]["accuracy"] <= verdict["test"]["clean"]["accuracy"]


# Log


def identity(*raced: str, commit: str = "c" * 40) -> Identity:
    machine = {key: MACHINE[key] for key in MACHINE_KEYS}
    return Identity(
        commit=commit, code="d" * 16, data="CIFAR-10", test="0" * 64, raced=list(raced), machine=machine
    )


def store(folder: Path, name: str, seconds: float, *, loop: str = "fastdynat", **more: Any) -> None:
    record = replace(TINY, name=name, loop=loop)  # type: ignore[arg-type]
    laps = [lap | {"seconds": seconds} for lap in three(**more.pop("lap", {}))]
    document = result_document(
        record,
        laps,
        own=identity(name),
        **{"target": None, "command": "fastdynat speedrun", "alongside": {}, **more},
    )
    (folder / f"{name}.json").write_text(json.dumps(document))


def test_the_log_lists_records_with_their_speed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path, "base", 100.0, loop="plain")
    store(tmp_path, "together", 10.0, alongside={"base": [110.0, 90.0, 130.0]})
    store(tmp_path, "alone", 20.0)
    store(tmp_path, "linked", 20.0, alongside={"together": [8.0, 7.0, 9.0]})  # 0.4 x 11; the seconds say 5
    store(tmp_path, "twice", 30.0, alongside={"linked": [15.0] * 3, "cpu2-noise": [1.0] * 3})
    elsewhere = {**MACHINE, "threads": 1}
    store(tmp_path, "stopped", 10.0, alongside={"base": [110.0, 90.0, 100.0, 900.0]})
    store(tmp_path, "elsewhere", 5.0, lap={"environment": elsewhere})
    store(tmp_path, "missed", 5.0, lap={"pgd20": 0.2}, alongside={"base": [100.0] * 3})
    other = judged()["test"] | {"sha256": "1" * 64}
    store(tmp_path, "other images", 5.0, lap={"test": other}, alongside={"base": [100.0] * 3})
    store(tmp_path, "farther", 5.0, target=0.305, alongside={"base": [100.0] * 3})
    header, *rows = log_table(tmp_path, "cpu-2")
    assert header == HEADER
    at = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    names = ("base", "together", "stopped", "alone", "linked", "twice", "elsewhere")
    names += ("missed", "other images", "farther")
    assert {name: at[name]["speed-up"] for name in names} == {
        **{"base": "1", "together": "11.0", "stopped": "10.0", "alone": "~5.0", "elsewhere": ""},
        **{"missed": "", "other images": "", "farther": "", "linked": "~4.4", "twice": "~2.2"},
    }
    assert at["alone"]["seconds"] == "20.0 (20.0 to 20.0)"
    assert (at["missed"]["counts"], at["alone"]["counts"]) == ("no", "yes")
    # A baseline that AutoAttack brings far down is still what people start from; one below the target is not.
    store(tmp_path, "base", 100.0, loop="plain", lap={"gap": 0.05})
    at = {row[0]: dict(zip(header, row, strict=True)) for row in log_table(tmp_path, "cpu-2")[1:]}
    assert (at["base"]["counts"], at["base"]["speed-up"]) == ("no", "1")
    assert (at["together"]["speed-up"], at["missed"]["speed-up"]) == ("11.0", "")
    for broken in ({"pgd20": 0.2}, {"sample": None}):
        store(tmp_path, "base", 100.0, loop="plain", lap=broken)
        assert {row[HEADER.index("speed-up")] for row in log_table(tmp_path, "cpu-2")[1:]} == {""}
    assert at["cpu2-madry"]["seconds"] == "not measured yet"
    assert main(["speedrun", "--list", "--log", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*at, "gpu1-fgsm-rs"))


def test_the_printed_log_fits_100_columns_and_explains_itself(tmp_path: Path) -> None:
    store(tmp_path, "base", 1000.0, loop="plain", lap={"gap": 0.05})
    store(tmp_path, "cpu2-sixteen-char", 20.0, target=0.305)
    store(tmp_path, "elsewhere", 5.0, lap={"environment": {**MACHINE, "threads": 7}})
    out = io.StringIO()
    show_log(Console(file=out, width=100), tmp_path, "cpu-2")
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    rows = {
        line.split()[0]: line.split() for line in lines if line.startswith(("base ", "cpu2-sixteen-char "))
    }
    assert rows["cpu2-sixteen-char"][2:6] == ["30.5", "20.0", "(20.0", "to"]
    assert (rows["base"][2], rows["base"][-1]) == ("30", "no")
    machines = [line for line in lines if line.startswith("cpu-2: ")]
    assert len(machines) == 2  # times of two machines do not stand in one table
    assert any(line.startswith("counts: no means that AutoAttack is more than 4 points") for line in lines)
    assert any(line.startswith("~: not raced") for line in lines)
    assert any(line.startswith("cpu2-madry (not measured yet): The same settings") for line in lines)


def test_the_log_is_found_from_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["speedrun", "--list"]) == 0
    assert "cpu2-sharp       2026-11-30 30" in capsys.readouterr().out
    assert main(["speedrun", "--list", "--log", "nothing"]) == 0
    said = capsys.readouterr().out
    assert "no results at nothing; run in the checkout or pass --log" in said
    assert "not measured yet" not in said


@pytest.mark.parametrize(
    ("track", "changes", "text"),
    [
        ("cpu-2", {"cpu": "2-core Intel(R) Xeon(R) Processor"}, "Intel Xeon (AVX-512), 2 threads"),
        (
            *("cpu-2", {"cpu": "2-core AMD EPYC 7763 64-Core Processor", "processor": {"flags": ["avx2"]}}),
            "AMD EPYC 7763 (AVX2), 2 threads",
        ),
        (
            *("cpu-2", {"cpu": "1-core Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "threads": 1}),
            "Intel Core i7-8700 (AVX-512), 1 thread",
        ),
        ("gpu-1", {"gpus": ["NVIDIA H200", "NVIDIA H200"]}, "NVIDIA H200"),
    ],
)
def test_each_row_of_the_log_names_its_machine(
    tmp_path: Path, track: str, changes: dict[str, Any], text: str
) -> None:
    own = {**MACHINE, "threads": 2, "processor": {"flags": ["avx", "avx2", "avx512f"]}, **changes}
    assert machine_text(track, own) == text
    store(tmp_path, "one", 5.0, lap={"environment": own})
    rows = {row[0]: row[HEADER.index("machine")] for row in log_table(tmp_path)[1:]}
    assert rows["cpu2-madry"] == ""  # not measured
    assert track != "cpu-2" or rows["one"] == text


def test_a_file_that_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert main(["speedrun", "--list", "--log", str(tmp_path)]) == 2
    assert "x.json is not a result of fastdynat speedrun" in capsys.readouterr().err


def test_a_record_follows_the_one_that_it_changes(tmp_path: Path) -> None:
    names = [row[0] for row in log_table(tmp_path)[1:]]
    assert sorted(names) == definition_names()
    for name in names:
        earlier = read_definition(name).against
        assert earlier is None or names.index(earlier) < names.index(name)


def test_the_docs_page_states_the_rules_and_shows_a_definition(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "speedrun.md").read_text(encoding="utf-8")
    shown = tmp_path / "mine.yaml"
    shown.write_text(text.partition('title="mine.yaml"\n')[2].partition("```")[0])
    assert read_definition(str(shown)).against in definition_names()
    gap, sample = f"{100 * race_rules.LARGEST_GAP:g} points", f"{race_rules.SAMPLE:,} test images"
    assert all(words in text for words in (gap, sample, race_rules.EPS, race_rules.STEP_SIZE, "10,000"))
