"""`fastdynat compare`: its runs are `train`'s, its numbers `eval`'s, and it goes on where it was stopped."""

import importlib.util
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import needs
from hypothesis import given
from hypothesis import strategies as st

from fastdynat.commands.compare import epoch_cost as probe
from fastdynat.commands.compare import run_plans as plan
from fastdynat.commands.evaluate import cells as evaluation
from fastdynat.commands.main import main
from fastdynat.config import AttackConfig
from fastdynat.machine.peak_memory import PeakMemory
from fastdynat.methods.configs import default_config, stored_config
from fastdynat.training.schedules import attack_steps
from fastdynat.training.step import TrainStep
from fastdynat.tuning import devices
from fastdynat.tuning.choices import Choice

# 64 digits in 2 batches, one attack step: a run takes half a second.
TINY = ["--train-size", "64", "--val-size", "10", "--batch-size", "32", "--steps", "1", "--quiet"]
TWO = ["--methods", "natural,madry", "--attacks", "clean,fgsm"]
PLAIN = [*TWO, "--epochs", "2", "--seeds", "1,2", *TINY]


def compare(out: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    """Run the command; returns the stored results."""
    assert main(["compare", "--out", str(out), *flags]) == code
    path = out / "compare.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison; it is only read."""
    out = tmp_path_factory.mktemp("compare") / "whole"
    compare(out, *PLAIN)
    return out


def weights(out: Path, run: str) -> list[bytes]:
    return [(out / run / link / "model.safetensors").read_bytes() for link in ("best", "last")]


def timeless(doc: dict[str, Any]) -> Any:
    """The part of the document that must not depend on how often the comparison was stopped."""
    runs = []
    for run in doc["runs"]:
        rows = [
            {k: v for k, v in row.items() if k not in ("train_seconds", "images_per_s")}
            for row in run["epochs"]
        ]
        accuracy = [[(a["attack"], a["correct"]) for a in r["attacks"]] for r in run["evaluations"]]
        runs.append((run["method"], run["seed"], run["ended"], rows, accuracy))
    return runs


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever trains or measures now fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done before")

    monkeypatch.setattr(TrainStep, "__call__", fail)
    monkeypatch.setattr(evaluation, "measure", fail)


# The runs and the results


def test_each_run_is_trains_and_each_number_evals(whole: Path, tmp_path: Path) -> None:
    doc = json.loads((whole / "compare.json").read_text())
    assert doc["format"] == "fastdynat-compare/1"
    assert doc["environment"]["torch"] == torch.__version__
    assert doc["config"]["train_size"] == 64
    assert [(run["method"], run["seed"]) for run in doc["runs"]] == [
        ("natural", 1),
        ("madry", 1),
        ("natural", 2),
        ("madry", 2),
    ]
    run = tmp_path / "run"
    assert (
        main(["train", "--method", "madry", "--seed", "2", "--epochs", "2", "--run-dir", str(run), *TINY])
        == 0
    )
    assert weights(tmp_path, "run") == weights(whole, "madry-seed2")
    assert main(["eval", str(run), "--attacks", "clean,fgsm", "--json", str(tmp_path / "e.json")]) == 0
    theirs = json.loads((tmp_path / "e.json").read_text())["results"]
    ours = doc["runs"][3]["evaluations"]
    for a, b in zip(ours, theirs, strict=True):
        assert [x["correct"] for x in a["attacks"]] == [x["correct"] for x in b["attacks"]]
        assert (a["checkpoint"], a["eps"], a["weights_sha256"]) == (
            b["checkpoint"],
            b["eps"],
            b["weights_sha256"],
        )


def test_flags_may_be_bare_or_spelt_as_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Choice("bf16", True, False, "as the test says")
    monkeypatch.setattr(devices, "choose", lambda *_, **__: chosen)  # timings differ from call to call
    found = compare(
        tmp_path / "c",
        "--methods",
        "madry",
        "--attacks",
        "clean",
        "--epochs",
        "1",
        *TINY,
        "--amp",
        "--epsilon",
        "0.2",
    )
    run = stored_config(tmp_path / "c" / "madry-seed1")
    assert (run.engine.amp, run.attack.eps) == ("bf16", 0.2)
    assert found["rows"]


def test_rows_are_means_over_seeds(whole: Path) -> None:
    doc = json.loads((whole / "compare.json").read_text())
    assert [(r["method"], r["checkpoint"]) for r in doc["rows"]] == [
        (method, checkpoint) for method in ("natural", "madry") for checkpoint in ("best", "last")
    ]
    row = doc["rows"][3]
    runs = [run for run in doc["runs"] if run["method"] == "madry"]
    last = [[a["accuracy"] for a in run["evaluations"][1]["attacks"]] for run in runs]
    for i, name in enumerate(("clean", "fgsm")):
        accuracy, found = [values[i] for values in last], row["accuracy"][name]
        assert found["values"] == accuracy
        assert found["mean"] == pytest.approx(numpy.mean(accuracy))
        assert found["std"] == pytest.approx(numpy.std(accuracy, ddof=1))
    assert row["robustness_gap"]["mean"] == pytest.approx(
        numpy.mean([clean - robust for clean, robust in last])
    )
    seconds = [[r["train_seconds"] for r in run["epochs"]] for run in runs]
    assert row["train_seconds"]["values"] == pytest.approx([sum(s) for s in seconds])
    assert row["seconds_per_epoch"]["values"] == pytest.approx([numpy.median(s) for s in seconds])
    rates = [[64 / r["train_seconds"] for r in run["epochs"]] for run in runs]
    assert row["images_per_s"]["values"] == pytest.approx([numpy.median(r) for r in rates], rel=0.02)
    assert (row["epochs"], row["epochs_trained"]) == (2, [2, 2])
    shares = [a["accuracy"] for run in doc["runs"] for r in run["evaluations"] for a in r["attacks"]]
    assert doc["largest_standard_error"] == pytest.approx(max(math.sqrt(p * (1 - p) / 359) for p in shares))


def test_the_table_shows_the_rows(whole: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    doc = compare(whole, *PLAIN)
    table = capsys.readouterr().out
    assert "359 test images of digits, linf eps 0.1" in table
    assert f"standard error at most {100 * doc['largest_standard_error']:.1f} points" in table
    assert "mean ± standard deviation over 2 seeds" in table
    for row in doc["rows"]:
        for found in (*row["accuracy"].values(), row["robustness_gap"]):
            assert f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f}" in table
    assert f"{doc['rows'][2]['peak_memory_bytes'] / 2**20:,.0f}" in table


def test_all_methods_start_from_the_defaults_of_the_data(tmp_path: Path) -> None:
    """No flags but those that make it small: dynat gets its guide, natural none."""
    doc = compare(tmp_path / "out", *TINY, "--epochs", "1", "--attacks", "clean")
    assert [run["config"]["guide"] for run in doc["runs"]] == ["none", "none", "small"]
    assert all(row["robustness_gap"] is None for row in doc["rows"])


# Going on


def test_stopped_inside_the_second_run_it_goes_on_exactly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, step, calls = tmp_path / "parts", TrainStep.__call__, []

    def interrupted(self: TrainStep, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # a run has four steps
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    compare(out, *PLAIN, code=130)
    assert f"the same command goes on, with --out {out}" in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["madry-seed1", "natural-seed1"]
    assert torch.load(out / "madry-seed1" / "last" / "state.pt", weights_only=True)["global_step"] == 1
    doc = compare(out, *PLAIN)
    assert len(calls) == 16
    assert timeless(doc) == timeless(json.loads((whole / "compare.json").read_text()))
    for run in ("natural-seed1", "madry-seed1", "natural-seed2", "madry-seed2"):
        assert weights(out, run) == weights(whole, run)


def test_stopped_inside_an_evaluation_it_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measure, names = tmp_path / "out", evaluation.measure, []

    def interrupted(model: Any, images: Any, attack: Any, **kwargs: Any) -> Any:
        names.append(attack.name)
        if len(names) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(model, images, attack, **kwargs)

    monkeypatch.setattr(evaluation, "measure", interrupted)
    flags = [*TINY, "--methods", "natural", "--attacks", "clean,fgsm", "--epochs", "1"]
    assert compare(out, *flags, code=143) == {}
    doc = compare(out, *flags)
    assert names == ["clean", "fgsm", "fgsm"]  # best and last are one
    assert [len(r["attacks"]) for r in doc["runs"][0]["evaluations"]] == [2, 2]


def test_what_was_done_is_not_done_again_and_more_may_be_asked(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    flags = [*TINY, "--methods", "natural", "--epochs", "1"]
    first = compare(out, *flags, "--attacks", "clean")
    measure, names, step, steps = evaluation.measure, [], TrainStep.__call__, []
    monkeypatch.setattr(
        evaluation,
        "measure",
        lambda m, i, attack, **k: (names.append(attack.name), measure(m, i, attack, **k))[1],
    )
    monkeypatch.setattr(TrainStep, "__call__", lambda self, batch: (steps.append(1), step(self, batch))[1])
    second = compare(out, *flags, "--attacks", "clean,fgsm")
    assert (names, steps) == (["fgsm"], [])
    assert (
        second["runs"][0]["evaluations"][0]["attacks"][0] == first["runs"][0]["evaluations"][0]["attacks"][0]
    )
    third = compare(out, *flags, "--attacks", "clean", "--seeds", "1,3")
    assert (names, len(steps)) == (["fgsm", "clean"], 2)
    assert [run["seed"] for run in third["runs"]] == [1, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0.01"], "was begun with lr 0.03, not 0.01; keep it, or choose a new --out"),
        (["--epochs", "3"], "was begun with epochs 2, not 3"),
        (
            ["--set", "madry.bn_clean_forward=true"],
            "madry-seed1 was begun with bn_clean_forward False, not True",
        ),
        (["--eps", "0.2"], "was begun with eps 0.1, not 0.2"),
        (["--stop-at", "0.9"], "was begun with stop_at None, not 0.9"),
    ],
)
def test_a_changed_flag_is_refused(
    whole: Path, idle: None, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    before = (whole / "ledger.json").read_bytes()
    compare(whole, *PLAIN, *flags, code=2)
    assert message in capsys.readouterr().err
    assert (whole / "ledger.json").read_bytes() == before


def test_another_budget_is_refused(whole: Path, idle: None, capsys: pytest.CaptureFixture[str]) -> None:
    compare(whole, *TWO, "--seeds", "1,2", *TINY, "--budget-seconds", "5", code=2)
    assert "was begun with budget_seconds None, not 5.0" in capsys.readouterr().err


def test_a_damaged_ledger_and_a_second_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastdynat.runs import lock_folder

    out = tmp_path / "out"
    out.mkdir()
    with lock_folder(out):
        compare(out, *PLAIN, code=2)
    assert "is in use by another fastdynat process" in capsys.readouterr().err
    (out / "ledger.json").write_text('{"format": ')
    compare(out, *PLAIN, code=2)
    assert (
        "ledger.json is not JSON: it is truncated or not a comparison's ledger; choose"
        in capsys.readouterr().err
    )


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "natural,madri"], "unknown method 'madri': did you mean 'madry'"),
        (["--methods", "natural,natural"], "--methods must name one method or more, each once"),
        (["--methods", ","], "--methods must name one method or more"),
        (["--seeds", "1,1"], "--seeds must be different whole numbers such as 1,2,3, got '1,1'"),
        (["--seeds", "one"], "--seeds must be different whole numbers"),
        (["--seeds=-1"], "seed must be in"),
        (
            ["--set", "madry.bn_clean_forwards=1"],
            "--set madry: unknown key 'bn_clean_forwards': did you mean 'bn_clean_forward'",
        ),
        (["--set", "natural.beta=1"], "--set natural: unknown key 'beta'"),
        (["--set", "natural.lrr=1"], "did you mean 'lr'"),
        (["--set", "natural.lr=fast"], "--set natural: lr must be float or nothing, got 'fast'"),
        (["--set", "dynat.beta=1"], "unknown method of --set (known are those in --methods) 'dynat'"),
        (["--set", "natural.lr=1", "--set", "natural.lr=2"], "--set natural.lr is given twice"),
        (["--set", "natural.seed=3"], "--set natural.seed: use --seeds"),
        (["--set", "natural.run-dir=x"], "--set natural.run-dir: use --out"),
        (["--set", "lr=1"], "--set takes METHOD.KEY=VALUE, such as dynat.beta=0.5, got 'lr=1'"),
        (
            ["--set", "natural.epochs=3"],
            "epochs is 3 for natural and 2 for madry: a comparison needs one value; give --epochs",
        ),
        (
            ["--set", "madry.eps=0.2"],
            "eval_eps is 0.1 for natural and 0.2 for madry: a comparison needs one value; give --eval-eps",
        ),
        (["--set", "madry.epoch-steps=1"], "epoch_steps is None for natural and 1 for madry"),
        (["--norms", "linf,l2"], "natural: --norms linf,l2: a comparison measures one norm"),
        (["--set", "madry.norms=linf,l2"], "madry: --norms linf,l2: a comparison measures one norm"),
        (["--set", "madry.model=resnet18"], "model is auto for natural and resnet18 for madry"),
        (["--set", "madry.steps=-1"], "madry: steps must be >= 0, got -1"),
        (["--budget-seconds", "0"], "--budget-seconds must be above 0 seconds, got 0"),
        (["--budget-seconds", "9"], "--budget-seconds decides the number of epochs; leave --epochs out"),
        (["--norm", "l1", "--attacks", "clean,mim10"], "mim10"),
        (["--attacks", "clean,pdg20"], "unknown attack 'pdg20': did you mean 'pgd20'"),
        (["--model", "resnet81"], "natural: unknown model 'resnet81': did you mean 'resnet18'"),
        (
            ["--batch-size", "65"],
            "natural: batch size 65 must be between 1 and the number of training images, 64",
        ),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "nowhere"),
        (["--chart", "a.jpg"], "--chart must end in .svg, .png, .pdf, got 'a.jpg'"),
        (["--chart", "a.svg"], "--chart a.svg needs matplotlib: pip install 'fastdynat[plots]'"),
        (["--json", "nowhere/a.json"], "cannot write nowhere/a.json"),
        (["--config", "beta.yaml"], "beta.yaml: beta is an option of dynat: use --set dynat.beta=1"),
        (["--config", "method.yaml"], "method.yaml: a comparison has no method: use --methods"),
        (["--config", "lrr.yaml"], "lrr.yaml: unknown key 'lrr': did you mean 'lr'"),
        (["--out", "occupied"], "occupied is not empty and holds no comparison; choose another --out"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a)
    )
    for key in ("beta", "method", "lrr"):
        Path(f"{key}.yaml").write_text(f"{key}: 1\n")
    Path("occupied").mkdir()
    Path("occupied/thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *TWO, "--epochs", "2", *TINY, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdynat: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_taken_during_the_checks_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another comparison may begin in the same folder while this one measures."""
    monkeypatch.chdir(tmp_path)
    taken = Path("runs/compare-digits/natural-seed1")
    real = plan._try

    def taken_meanwhile(*args: Any) -> None:
        taken.mkdir(parents=True, exist_ok=True)
        (taken / "config.yaml").write_text("another comparison's\n")
        real(*args)

    monkeypatch.setattr(plan, "_try", taken_meanwhile)
    assert main(["compare", *TWO, "--epochs", "1", *TINY]) == 0
    assert sorted(p.name for p in Path("runs/compare-digits").rglob("*")) == ["config.yaml", "natural-seed1"]
    out = Path("runs/compare-digits-2")
    assert {p.name for p in out.iterdir()} >= {"compare.json", "ledger.json", "natural-seed1", "madry-seed1"}
    assert f"done: {out / 'compare.json'}" in capsys.readouterr().err


def test_shared_flags_come_from_a_file_and_options_from_set(tmp_path: Path) -> None:
    file = tmp_path / "shared.yaml"
    file.write_text(
        "train_size: 64\nval_size: 20\nbatch_size: 32\nsteps: 2\nepochs: 1\nlr: 1e-2\nseed: 7\nquiet: true\n"
    )
    flags = ["--config", str(file), "--steps", "1", "--methods", "natural,madry", "--attacks", "clean"]
    flags += ["--cutmix", "1", "--cutout", "4"]
    doc = compare(
        tmp_path / "out", *flags, "--set", "madry.bn-clean-forward=on", "--set=natural.milestones=[0.2, 0.4]"
    )
    natural, madry = (run["config"] for run in doc["runs"])
    assert (natural["lr"], natural["steps"], natural["seed"], natural["milestones"]) == (
        0.01,
        1,
        7,
        [0.2, 0.4],
    )
    assert (madry["lr"], madry["milestones"], madry["bn_clean_forward"]) == (0.01, [0.5, 0.75], True)
    assert [(run["cutmix"], run["cutout"]) for run in (natural, madry)] == [(1.0, 4)] * 2
    assert doc["settings"] == {"natural": {"milestones": [0.2, 0.4]}, "madry": {"bn_clean_forward": True}}


# The budget


def test_a_probe_times_warm_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of two steps of at least 0.1 s; later epochs take longer where fewer attack steps end."""
    from fastdynat.training import open_split
    from fastdynat.training.resolve import resolve, resolve_loader

    config = default_config("madry")
    data = replace(config.data, train_size=64, val_size=10.0, batch_size=32)
    config = replace(config, data=data, attack=replace(config.attack, steps=2, early_steps=1))
    split = open_split(config)
    config = resolve_loader(resolve(config, split.info), split)

    def wait(self: TrainStep, batch: Any) -> Any:
        time.sleep(0.1 * self.spec.steps)
        return {}

    monkeypatch.setattr(TrainStep, "__call__", wait)
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.3)
    found = probe.probe(config, split, 3.3)
    assert found["start_seconds"] == 0
    # Bounds for a machine that has other work too.
    assert 0.2 <= found["first_epoch_seconds"] < 0.4 <= found["later_epoch_seconds"] < 0.8
    half = 0.5 * (found["first_epoch_seconds"] + found["later_epoch_seconds"])
    assert found["epochs"] * half == pytest.approx(
        found["expected_seconds"], abs=found["later_epoch_seconds"]
    )
    assert found["expected_seconds"] <= 3.3
    # More than half of the run early: later epochs are still those with all steps.
    found = probe.probe(replace(config, attack=replace(config.attack, early_share=0.9)), split, 3.3)
    assert found["first_epoch_seconds"] < 0.4 <= found["later_epoch_seconds"]
    found = probe.probe(replace(config, optim=replace(config.optim, burn_in=3)), split, 0.1)
    assert found["epochs"] == 4  # at least one of the method
    assert found["burn_in_epoch_seconds"] > 0


def test_an_epoch_of_given_steps_is_timed_and_counted_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two steps to a pass an epoch takes one: half as many seconds, and as many images per second."""
    from fastdynat.training import open_split
    from fastdynat.training.resolve import resolve, resolve_loader

    config = default_config("madry")
    data = replace(config.data, train_size=64, val_size=10.0, batch_size=32, epoch_steps=1)
    config = replace(config, data=data, attack=replace(config.attack, steps=1))
    split = open_split(config)
    config = resolve_loader(resolve(config, split.info), split)
    step = TrainStep.__call__

    def slow(self: TrainStep, batch: Any) -> Any:
        time.sleep(0.3)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", slow)
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.5)
    found = probe.probe(config, split, 1.0)
    assert 0.3 <= found["first_epoch_seconds"] < 0.6
    doc = compare(
        tmp_path / "c",
        *TINY,
        "--methods",
        "madry",
        "--attacks",
        "clean",
        "--epochs",
        "2",
        "--epoch-steps",
        "1",
    )
    (run,) = doc["runs"]
    seconds = numpy.median([row["train_seconds"] for row in run["epochs"]])
    assert run["images_per_s"] == pytest.approx(32 / seconds, rel=0.02)


@given(
    budget=st.floats(0.1, 50),
    first=st.floats(0.1, 5),
    later=st.floats(0.1, 5),
    early=st.booleans(),
    share=st.floats(0, 1),
    warmup=st.integers(0, 20),
)
def test_the_most_epochs_that_fit(
    budget: float, first: float, later: float, early: bool, share: float, warmup: int
) -> None:
    """Against a sum over epochs, each as the engine will run it."""
    later = max(first, later)
    attack = AttackConfig(steps=2, early_steps=1 if early else None, early_share=share, awp_warmup=warmup)
    config = replace(default_config("madry"), attack=attack)

    def takes(epochs: int) -> float:
        steps = attack_steps(attack, epochs)
        return sum(first if steps(e) == 1 or e < warmup else later for e in range(epochs))

    epochs = probe.epochs_within(budget, first, later, config)
    assert epochs == 1 or takes(epochs) <= budget * (1 + 1e-9)
    assert takes(epochs + 1) > budget * (1 - 1e-9)


def test_each_method_gets_the_epochs_that_fit_and_its_schedule_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(self: Any) -> tuple[float, float]:
        return (0.05, 0.3) if self._step.method.name == "natural" else (0.0, 2.0)

    monkeypatch.setattr(probe._Timer, "epoch_seconds", measured)
    flags = [*TWO, *TINY, "--budget-seconds", "1", "--schedule", "cosine"]
    doc = compare(tmp_path / "out", *flags)
    printed = capsys.readouterr()
    assert [len(run["epochs"]) for run in doc["runs"]] == [3, 1]
    assert doc["probes"]["natural"]["epochs"] == 3
    assert "natural: 0.3 s for an epoch, 3 in 0.95 of 1 s" in printed.err
    assert "madry: one epoch takes 2 s, more than the budget" in printed.out
    assert "of budget" in printed.out
    share = doc["runs"][0]["train_seconds"]
    assert f"{share:.0%}" in printed.out
    last, steps = doc["runs"][0]["epochs"][-1], 6
    assert last["lr"] == pytest.approx(0.03 * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2)
    # Going on, nothing is measured again: another speed changes nothing.
    monkeypatch.setattr(probe._Timer, "epoch_seconds", lambda *args: 1 / 0)
    assert compare(tmp_path / "out", *flags)["probes"] == doc["probes"]


# Divergence, memory, pictures


def test_a_run_that_diverges_is_reported_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    flags = [*TWO, "--epochs", "1", *TINY, "--schedule", "constant", "--set", "natural.lr=1e30"]
    for turn in range(2):
        if turn:
            request.getfixturevalue("idle")
        doc = compare(tmp_path / "out", *flags, code=1)
        assert [run["ended"] for run in doc["runs"]] == ["diverged", "finished"]
        printed = capsys.readouterr().out
        assert "natural (1 of 1 diverged)" in printed
        assert "natural, seed 1 diverged: loss is" in printed
        assert doc["rows"][0]["accuracy"] == {}
        assert doc["rows"][2]["accuracy"].keys() == {"clean", "fgsm"}


def test_a_run_that_ended_early_is_said_to_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """A constant guess is right for one of the ten validation images, one of each class."""
    flags = ["--methods", "natural", "--attacks", "clean", "--epochs", "30", *TINY, "--stop-at", "0.05"]
    for turn in range(2):
        if turn:
            request.getfixturevalue("idle")
        doc = compare(tmp_path / "out", *flags)
        printed = capsys.readouterr().out
        ((trained,), asked) = doc["rows"][0]["epochs_trained"], doc["rows"][0]["epochs"]
        assert 1 <= trained < asked == 30
        assert f"{trained} of 30" in printed
        assert f"natural, seed 1 ended after epoch {trained} of 30: --stop-at 0.05 is reached" in printed
    file = tmp_path / "out" / "ledger.json"
    ledger = json.loads(file.read_text())
    for run in ledger["runs"].values():
        del run["reason"]  # as an earlier version stored it
    file.write_text(json.dumps(ledger))
    compare(tmp_path / "out", *flags)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert f"natural, seed 1 ended after epoch {trained} of 30" in lines


@needs("matplotlib")
def test_the_mean_of_a_chart_has_every_seed_that_did_not_diverge() -> None:
    from fastdynat.commands.compare.comparison_chart import _draw_method
    from fastdynat.commands.figures import new_figure

    def mean(whole: list[Any], lost: list[Any]) -> list[list[float]]:
        axes = new_figure(4).subplots()
        _draw_method(axes, whole, lost, "black", "-")
        thick = [line for line in axes.lines if line.get_linewidth() > 1]
        return thick[0].get_xydata().tolist()

    long, short, other = [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)], [(1.0, 20.0), (4.0, 40.0)], [(5.0, 1.0)]
    assert mean([long, short], [other]) == [[1.0, 15.0], [3.0, 30.0]]
    assert mean([], [other, short]) == [[1.0, 20.0], [4.0, 40.0]]


def test_peak_memory_is_that_of_the_work() -> None:
    memory = PeakMemory(torch.device("cpu"))
    if not memory.exact:
        pytest.skip("this system does not let a process reset its peak")
    big = torch.ones(100 * 2**18)  # 100 MiB
    assert memory.bytes() >= 100 * 2**20
    assert memory.peak() > memory.bytes()
    del big
    assert PeakMemory(torch.device("cpu")).bytes() < 50 * 2**20


@needs("matplotlib")
def test_the_chart_names_every_method(whole: Path, idle: None, tmp_path: Path) -> None:
    compare(whole, *PLAIN, "--chart", str(tmp_path / "a.svg"), "--json", str(tmp_path / "a.json"))
    picture = (tmp_path / "a.svg").read_text()
    assert picture.lstrip().startswith("<?xml")
    for text in (
        "natural",
        "madry",
        "validation accuracy under PGD-10, %",
        "training time without validation, seconds",
    ):
        assert f">{text}</text>" in picture
    assert "#767676" in picture
    assert "fill: #ffffff" not in picture
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((whole / "compare.json").read_text())
    compare(whole, *PLAIN, "--chart", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
