"""`fastdynat eval` beyond runs: foreign models, ragged batches, masking checks, output and refusals."""

import io
import json
import math
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.networks import tiny_cnn
from support.tiny_run import TINY
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attacks import NamedAttack, Nearest, parse_attack, register, registry
from fastdynat.commands.evaluate import cells
from fastdynat.commands.evaluate.columns import AttackColumn, parse_columns
from fastdynat.commands.evaluate.record import counts_in_ball, median_distance, worst_case
from fastdynat.commands.evaluate.settle import EvalConfig, Shard, parse_shard, with_amp_chosen
from fastdynat.commands.evaluate.tables import accuracy_text, print_results
from fastdynat.commands.main import main
from fastdynat.data import ImageSet, load_test
from fastdynat.errors import UserError
from fastdynat.evaluation import Measurement, measure
from fastdynat.evaluation.halving import out_of_memory, with_halving
from fastdynat.evaluation.outcome import unpack_bits, wilson
from fastdynat.tuning.devices import AmpChoice

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--method", "madry", "--run-dir", str(run), *TINY]) == 0
    return run


def evaluate(folder: Path, *argv: object) -> dict[str, Any]:
    out = folder / "e.json"
    flags = ("--num-images", "60", "--json", out)
    assert main(["eval", *(str(a) for a in (*argv, *flags))]) == 0
    document: dict[str, Any] = json.loads(out.read_text())
    assert document["format"] == "fastdynat-eval/2"
    assert document["complete"]
    return document


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["eval", *(str(a) for a in argv)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


# Batches that do not fit


def limited(largest: int, tried: list[int], error: Exception) -> Any:
    def run(batch_size: int) -> int:
        tried.append(batch_size)
        if batch_size > largest:
            raise error
        return batch_size

    return run


CPU_ERROR = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), CPU_ERROR])
def test_the_batch_is_halved_until_it_fits(error: RuntimeError, messages: list[str]) -> None:
    tried: list[int] = []
    assert with_halving(limited(7, tried, error), 50) == 7
    assert tried == [50, 25, 13, 7]
    assert len(messages) == 3
    assert "7 images per batch" in messages[-1]
    with pytest.raises(UserError, match="one image at a time"):
        with_halving(limited(0, [], error), 5)
    with pytest.raises(RuntimeError, match="shapes"):
        with_halving(limited(7, [], RuntimeError("shapes differ")), 50)


def test_the_cpu_allocators_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_what_the_failed_batch_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[Tensor]] = []

    def run(batch_size: int) -> int:
        if batch_size > 4:
            x = torch.zeros(batch_size)
            held.append(weakref.ref(x))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert held[0]() is None
        return batch_size

    assert with_halving(run, 8) == 4


def test_a_halved_evaluation_is_that_of_the_smaller_batch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--attacks", "pgd3", "--checkpoints", "last", "--cache")
    (small,) = evaluate(tmp_path, run, *flags, "off", "--batch-size", "15")["results"]
    original = cells.measure

    def full(*args: Any, **kwargs: Any) -> Measurement:
        found = original(*args, **kwargs)  # has drawn, and done all the work
        if kwargs["batch_size"] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(cells, "measure", full)
    capsys.readouterr()
    (halved,) = evaluate(tmp_path, run, *flags, tmp_path / "c")["results"]
    assert halved["attacks"][0]["batch_size"] == 15
    assert halved["attacks"][0]["robust_bits"] == small["attacks"][0]["robust_bits"]
    assert "out of memory: restarted with 15 images" in capsys.readouterr().out
    monkeypatch.setattr(cells, "measure", original)
    (kept,) = evaluate(tmp_path, run, *flags, tmp_path / "c")["results"]
    assert kept["attacks"] == halved["attacks"]


# Verdicts


def test_worst_counts_images_that_survive_everything(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--attacks", "clean,fgsm,pgd2,cw2", "--checkpoints", "last")
    (record,) = evaluate(tmp_path, run, *flags)["results"]
    masks = [unpack_bits(a["robust_bits"], 60) for a in record["attacks"]]
    survivors = sum(all(bool(mask[i]) for mask in masks) for i in range(60))
    worst = record["worst"]
    assert (worst["correct"], worst["images"], worst["accuracy"]) == (survivors, 60, survivors / 60)
    assert worst["attacks"] == ["clean", "fgsm", "pgd2", "cw2"]
    assert unpack_bits(worst["robust_bits"], 60).sum() == survivors
    assert worst["accuracy"] <= min(a["accuracy"] for a in record["attacks"])
    assert accuracy_text(worst) in capsys.readouterr().out
    assert worst_case(record["attacks"][:1]) is None


@dataclass(frozen=True)
class Step:
    """A nearest-image search along the gradient's sign with known distances: (i % 4) / 100 for image i."""

    eps: float = math.inf
    norm: str = "linf"

    def __call__(self, ascent: Ascent, x: Tensor, labels: Tensor, **kwargs: Any) -> Nearest:
        distance = (torch.arange(len(x)) % 4) / 100
        found = distance < 0.03
        x_adv = torch.where(found[:, None, None, None], torch.zeros_like(x), x)
        zero = torch.zeros((), dtype=torch.int64)
        return Nearest(
            x_adv, zero, 0, found=found, distance=distance.masked_fill(~found, math.inf), eps=self.eps
        )


def test_what_was_found_outside_the_ball_does_not_count() -> None:
    model = tiny_cnn().eval()
    x = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        images = ImageSet(x, model(x / 255).argmax(1))
        broken = int(model(torch.zeros(1, 3, 8, 8)).argmax())
    images.labels[images.labels == broken] = (broken + 1) % 10
    with torch.no_grad():
        right = model(x / 255).argmax(1) == images.labels
    number = torch.arange(40) % 4
    for eps, inside in ((0.01, number <= 1), (math.inf, number <= 2)):
        got = measure(model, images, NamedAttack("near", Step(eps)), device=CPU, batch_size=40, seed=0)
        robust = unpack_bits(got.robust_bits, 40)
        assert not bool(robust[inside].any())
        assert torch.equal(robust[number == 3], right[number == 3])
    expected = [[0.0, 0.01, 0.02, None][n] if ok else 0.0 for n, ok in zip(number, right, strict=True)]
    assert got.distances == [None if d is None else pytest.approx(d) for d in expected]
    assert median_distance({"distances": [0.0, 0.01, 0.02, None]}) == pytest.approx(0.015)
    assert median_distance({"distances": [0.1, None, None]}) is None


def test_worst_leaves_out_other_norms_and_searches_without_a_radius() -> None:
    for search, distances, counts in (
        (Step(0.1), [0.1], True),
        (Step(), [0.1], False),
        (Step(0.1, "l2"), [0.1], False),
        (None, None, True),
    ):
        column = AttackColumn("near", NamedAttack("near", search))
        assert counts_in_ball(column, {"distances": distances}, "linf") is counts
    pgd = parse_attack("pgd2", eps=0.1, step_size=0.1)
    assert counts_in_ball(AttackColumn("pgd2", pgd), {"distances": None}, "linf")
    assert not counts_in_ball(AttackColumn("pgd2", pgd), {"distances": None}, "l2")


# Models that we did not train


def fake_foreign(monkeypatch: pytest.MonkeyPatch, network: nn.Module, asked: list[Any]) -> None:
    def load_foreign(name: str, **kwargs: Any) -> Any:
        asked.append((name, kwargs))
        return SimpleNamespace(
            model=network, name=name, sha256="5" * 64, note="outputs look like probabilities"
        )

    module = ModuleType("fastdynat.models.foreign")
    module.load_foreign = load_foreign  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_foreign_model_is_evaluated_like_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info, images = load_test("digits", None)
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).eval()
    asked: list[Any] = []
    fake_foreign(monkeypatch, network, asked)
    monkeypatch.chdir(tmp_path)
    flags = ("--data", "digits", "--attacks", "clean,pgd2", "--checkpoints", "last", "--weights", "w.pt")
    ours, theirs = evaluate(tmp_path, run, "mine.nets:make", *flags)["results"]
    assert asked == [
        ("mine.nets:make", {"num_classes": 10, "image_shape": info.image_shape, "weights": Path("w.pt")})
    ]
    assert (ours["run"], ours["eps"]) == (str(run), 0.1)
    assert [theirs[key] for key in ("run", "checkpoint", "method", "epoch")] == [
        "mine.nets:make",
        None,
        None,
        None,
    ]
    assert (theirs["norm"], theirs["eps"], theirs["step_size"]) == ("linf", 8 / 255, 2 / 255)
    out = capsys.readouterr().out
    assert "no --eps given; using 8/255" in out
    assert "outputs look like probabilities" in out
    with torch.no_grad():
        right = network(images.images[:60] / 255).argmax(1) == images.labels[:60]
    assert theirs["attacks"][0]["correct"] == int(right.sum())
    assert {path.name.split("-")[0] for path in (tmp_path / "evaluations").iterdir()} == {"clean", "pgd2"}
    again = evaluate(tmp_path, "mine.nets:make", *flags, "--eps", "8/255")["results"][0]
    assert again["cached"] == ["clean", "pgd2"]


def test_a_foreign_model_needs_data_and_radii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_foreign(monkeypatch, nn.Flatten(), [])
    assert "give --data" in refused(capsys, "timm:resnet18")
    assert "needs --eps" in refused(capsys, "timm:resnet18", "--data", "digits", "--norm", "l2")
    assert "no run at" in refused(capsys, tmp_path / "nowhere", "--data", "digits")
    assert "at least one run" in refused(capsys)


# Checks of masking


def test_checks_are_printed_with_what_to_run_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Check:
        name: str
        passed: bool
        evidence: str
        remedy: str

    def check_masking(model: nn.Module, images: ImageSet, **kwargs: Any) -> Any:
        assert (kwargs["norm"], kwargs["eps"], len(images), kwargs["seed"]) == ("linf", 0.1, 60, 1)
        kwargs["advance"](60.0)
        return SimpleNamespace(
            checks=[
                Check("steps", False, "pgd20 50.0 %, pgd100 40.0 %", "run --attacks pgd500"),
                Check("fgsm", True, "fgsm 60.0 %", ""),
            ]
        )

    module = ModuleType("fastdynat.evaluation.masking")
    module.check_masking = check_masking  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (record,) = evaluate(tmp_path, run, "--attacks", "clean", "--checkpoints", "last", "--checks")["results"]
    assert [(c["name"], c["passed"]) for c in record["checks"]] == [("steps", False), ("fgsm", True)]
    out = capsys.readouterr().out
    assert "warning: steps: pgd20 50.0 %, pgd100 40.0 %; run --attacks pgd500" in out
    assert "fgsm 60.0 %" not in out


# Output


def test_the_json_keeps_its_keys(run: Path, tmp_path: Path) -> None:
    document = evaluate(tmp_path, run, "--attacks", "clean,fgsm", "--checkpoints", "last")
    assert set(document) == {"format", "complete", "config", "environment", "results"}
    (record,) = document["results"]
    about = (
        "run checkpoint weights_sha256 method architecture dataset epoch norm eps step_size "
        "data images images_sha256 shard"
    )
    found = "class_names source_sha256 judged_in robustness_gap worst in_ball attacks cached checks union"
    assert set(record) == {*about.split(), *found.split()}
    numbers = (
        "attack accuracy ci per_class robust_bits correct images seconds images_per_s "
        "zero_grad_share distances batch_size gradients"
    )
    assert set(record["attacks"][0]) == set(numbers.split())


def test_classes_and_a_narrow_terminal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "clean,fgsm,pgd2,pgd3,cw2,cw3"
    document = evaluate(tmp_path, run, "--attacks", names, "--checkpoints", "last", "--per-class")
    (record,) = document["results"]
    capsys.readouterr()
    assert (
        main(
            [
                "eval",
                str(run),
                "--attacks",
                names,
                "--checkpoints",
                "last",
                "--per-class",
                "--num-images",
                "60",
            ]
        )
        == 0
    )
    rows = [line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("│ 3 ")]
    assert [cell.strip() for cell in rows[0][1:7]] == [
        f"{100 * a['per_class'][3]:.2f}" for a in record["attacks"]
    ]
    record["run"] = "r"
    for width in (250, 120):
        text = io.StringIO()
        print_results([record], Console(file=text, width=width))
        for attack in record["attacks"]:
            assert f"{100 * attack['accuracy']:.2f}" in text.getvalue()
        assert "…" not in text.getvalue()


@pytest.mark.parametrize(
    ("correct", "images", "text"),
    [
        # Wilson's interval has its ends at z^2 / (n + z^2) of 0 and 1, where z^2 = 3.8415.
        (0, 60, "0.00 +6.02/-0.00"),
        (60, 60, "100.00 +0.00/-6.02"),
        (9, 20, "45.00 ±19.99"),  # from 25.82 to 65.79, as tables give it
        (5_000, 10_000, "50.00 ±0.98"),
        (9_000, 10_000, "90.00 ±0.59"),  # its sides are 0.57 and 0.60
        (0, 10**9, "0.00 ±0.00"),
    ],
)
def test_both_sides_of_a_lopsided_interval_are_shown(correct: int, images: int, text: str) -> None:
    values = {"accuracy": correct / images, "ci": wilson(correct, images)}
    assert accuracy_text(values) == text
    assert accuracy_text(values, "\n") == text.replace(" ", "\n").replace("/", "\n")


@pytest.mark.parametrize(("correct", "said"), [(30, False), (0, True)])
def test_the_title_explains_both_sides_only_where_they_are_shown(
    run: Path, tmp_path: Path, correct: int, said: bool
) -> None:
    (record,) = evaluate(tmp_path, run, "--attacks", "clean", "--checkpoints", "last")["results"]
    record["attacks"][0] |= {"accuracy": correct / 60, "ci": wilson(correct, 60)}
    text = io.StringIO()
    print_results([record], Console(file=text, width=250))
    title = text.getvalue().partition(" test images")[0]
    explained = f"± half a 95 % interval, or +above/-below where its sides differ, {record['images']}"
    assert title.endswith(explained if said else f"± half a 95 % interval, {record['images']}")


def test_every_name_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list-attacks"]) == 0
    out = capsys.readouterr().out
    for name in ("clean", "pgd20", "autoattack", "fast-autoattack", "transfer-NAME", "my_attack.py:MyAttack"):
        assert f"│ {name} " in out


# Refusals


def test_refusals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'fast-autoattack'" in refused(capsys, run, "--attacks", "fast-autoatack")
    assert "named twice" in refused(capsys, run, "--attacks", "clean,Clean")
    assert "give --source" in refused(capsys, run, "--attacks", "transfer-pgd2")
    assert "nothing transfers" in refused(capsys, run, "--attacks", "transfer-clean", "--source", run)
    assert "transfer-NAME" in refused(capsys, run, "--attacks", "clean", "--source", run)
    assert "I/N" in refused(capsys, run, "--shard", "0/2")
    assert "use fewer" in refused(capsys, run, "--shard", "1/80", "--num-images", "60")
    assert "leave --amp bf16 out" in refused(capsys, run, "--attacks", "autoattack", "--amp", "bf16")
    l0 = ("--norm", "l0", "--eps", "5")
    assert "leave --checks out" in refused(capsys, run, "--attacks", "clean", "--checks", *l0)
    assert "autoattack knows linf, l2, l1, not l0" in refused(
        capsys, run, "--attacks", "clean,autoattack", *l0
    )


def test_only_attacks_that_half_precision_does_not_weaken_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"eps": 0.1, "step_size": 0.1, "norm": "linf"}
    assert [c.name for c in parse_columns("clean,pgd2", **sizes, amp="bf16")] == ["clean", "pgd2"]
    for registered in ("_registered", "_constructors"):
        monkeypatch.setattr(registry, registered, {})
    register("near", "steps of known length")(Step)
    assert parse_columns("near", **sizes, amp="off")[0].attack == NamedAttack("near", Step(0.1))
    with pytest.raises(UserError, match="near was not shown to be as strong in half precision"):
        parse_columns("near", **sizes, amp="bf16")


@pytest.mark.parametrize(
    ("attacks", "amp"),
    [
        ("clean,pgd2", "bf16"),
        ("clean,fast-autoattack", "off"),
        ("AutoAttack", "off"),
        ("clean,apgd-ce", "off"),
        ("nosuch", "bf16"),
    ],
)
def test_a_bare_amp_is_float32_where_an_attack_needs_it(
    attacks: str, amp: str, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(
        "fastdynat.commands.evaluate.settle.pick_amp",
        lambda mode, *rest: AmpChoice("bf16" if mode == "auto" else mode),
    )
    assert with_amp_chosen(EvalConfig(amp="auto", attacks=attacks)).amp == amp
    assert [("not shown to be as strong" in line) for line in messages] == [True] * (amp == "off")


@pytest.mark.parametrize("text", ["", "1", "3/2", "0/1", "a/b", "1/2/3", "-1/2"])
def test_shards_are_i_of_n(text: str) -> None:
    with pytest.raises(UserError, match="--shard must be I/N"):
        parse_shard(text)
    shards = [parse_shard(f"{i}/3") for i in (1, 2, 3)]
    assert sorted(i for s in shards if isinstance(s, Shard) for i in range(10)[s.rows]) == list(range(10))
