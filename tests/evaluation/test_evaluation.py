"""`fastdynat eval`: its numbers against a recomputation, its JSON, and the state it leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from support.tiny_run import TINY

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import parse_attack
from fastdynat.commands.evaluate import cells as evaluation
from fastdynat.commands.evaluate.columns import check_target_classes, parse_columns
from fastdynat.commands.main import main
from fastdynat.data import ImageSet, load_test
from fastdynat.errors import UserError
from fastdynat.evaluation import Stopped, measure
from fastdynat.evaluation.outcome import unpack_bits
from fastdynat.evaluation.transfer import transfer_matrix
from fastdynat.execution.float32 import float32_flags, put_float32_flags
from fastdynat.ops.image_draws import ImageDraws
from fastdynat.runs import load_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for method in ("natural", "dynat"):
        assert main(["train", "--method", method, "--run-dir", str(folder / method), *TINY]) == 0
    return [folder / "natural", folder / "dynat"]


def evaluate(out: Path, *argv: object) -> list[dict[str, Any]]:
    assert main(["eval", *(str(a) for a in argv), "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["format"] == "fastdynat-eval/2"
    assert document["environment"]["torch"] == torch.__version__
    results: list[dict[str, Any]] = document["results"]
    return results


def test_a_table_of_runs_and_checkpoints(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(tmp_path / "e.json", *runs, "--attacks", "clean,fgsm,pgd3,cw3", "--num-images", "100")
    table = capsys.readouterr().out
    assert [(Path(r["run"]).name, r["checkpoint"]) for r in results] == [
        ("natural", "best"),
        ("natural", "last"),
        ("dynat", "best"),
        ("dynat", "last"),
    ]
    for r in results:
        accuracy = {a["attack"]: a["accuracy"] for a in r["attacks"]}
        assert list(accuracy) == ["clean", "fgsm", "pgd3", "cw3"]
        assert r["images"] == 100
        assert r["eps"] == 0.1
        assert r["robustness_gap"] == accuracy["clean"] - min(
            accuracy["fgsm"], accuracy["pgd3"], accuracy["cw3"]
        )
        for a in r["attacks"]:
            assert a["correct"] == round(100 * a["accuracy"])
            assert a["seconds"] > 0
            assert (a["zero_grad_share"] is None) == (a["attack"] == "clean")
            assert f"{100 * a['accuracy']:.2f}" in table


def test_the_numbers_are_those_of_a_plain_loop(runs: list[Path], tmp_path: Path) -> None:
    (result,) = evaluate(
        tmp_path / "e.json",
        runs[1],
        "--attacks",
        "clean,pgd3",
        "--checkpoints",
        "last",
        "--batch-size",
        "128",
    )
    model, _ = load_network(runs[1] / "last" / "model.safetensors")
    _, images = load_test("digits", None)
    clean = robust = 0
    numbers = torch.arange(len(images)).split(100)  # no batch size is part of the result
    for x, y, rows in zip((images.images / 255).split(100), images.labels.split(100), numbers, strict=True):
        clean += int((model(x).argmax(1) == y).sum())
        draws = ImageDraws.of(1, rows, CPU)
        x_adv = start_point(x, "uniform", norm="linf", eps=0.1, generator=draws)
        for _ in range(3):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(
                torch.nn.functional.cross_entropy(model(x_adv), y, reduction="sum"), x_adv
            )
            x_adv = (x_adv.detach() + 0.025 * grad.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        robust += int((model(x_adv).argmax(1) == y).sum())
    assert [a["correct"] for a in result["attacks"]] == [clean, robust]


def test_an_evaluation_repeats_and_other_radii_are_used(runs: list[Path], tmp_path: Path) -> None:
    flags = ("--attacks", "pgd2", "--checkpoints", "last", "--num-images", "100")
    a, b = (evaluate(tmp_path / "e.json", runs[1], *flags)[0]["attacks"][0]["correct"] for _ in range(2))
    assert a == b
    (other,) = evaluate(tmp_path / "e.json", runs[1], *flags, "--norm", "l2", "--eps", "1.5")
    assert (other["norm"], other["eps"], other["step_size"]) == ("l2", 1.5, 0.375)
    (eight,) = evaluate(tmp_path / "e.json", runs[1], *flags, "--eps", "8", "--step-size", "2")
    assert (eight["eps"], eight["step_size"]) == (8 / 255, 2 / 255)


def test_training_afterwards_keeps_its_own_rounding(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[bool]] = []
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    measure_one = evaluation.measure

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append([owner.allow_tf32 for owner in flags])
        return measure_one(*args, **kwargs)

    monkeypatch.setattr(evaluation, "measure", spy)
    before = float32_flags()
    try:
        for owner in flags:
            owner.allow_tf32 = True
        evaluate(tmp_path / "e.json", runs[0], "--attacks", "clean", "--checkpoints", "last")
        assert seen == [[False, False]]
        assert [owner.allow_tf32 for owner in flags] == [True, True]
    finally:
        put_float32_flags(before)


def test_half_precision_evaluation_runs(runs: list[Path], tmp_path: Path) -> None:
    flags = ("--attacks", "clean,pgd2", "--checkpoints", "last", "--num-images", "200")
    full, half = (evaluate(tmp_path / "e.json", runs[1], *flags, "--amp", amp)[0] for amp in ("off", "bf16"))
    for a, b in zip(full["attacks"], half["attacks"], strict=True):
        assert abs(a["accuracy"] - b["accuracy"]) <= 0.03


def test_measure_restores_modes_leaves_the_global_generator_and_can_be_stopped() -> None:
    model = tiny_cnn(dropout=0.5).train()
    model[1].eval()
    images = ImageSet(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (10,)))
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    attack = parse_attack("pgd2", eps=0.1, step_size=0.05)
    seen: list[float] = []
    result = measure(model, images, attack, device=CPU, batch_size=4, seed=0, advance=seen.append)
    assert seen == [2, 2, 2, 2, 1, 1]  # after each of the two steps on 4, 4 and 2 images
    assert result.images == 10
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(Stopped):
        measure(model, images, attack, device=CPU, batch_size=4, seed=0, should_stop=lambda: len(seen) >= 3)
    assert [m.training for m in model.modules()] == modes


def test_training_after_an_evaluation_under_inference_mode_still_works() -> None:
    model = tiny_cnn()
    x, y = torch.rand(4, 3, 8, 8), torch.randint(10, (4,))
    with torch.inference_mode():
        adv = pgd(model, x, AttackGoal("ce", y), PGDSpec(0.1, 0.05, 1)).x_adv
    torch.nn.functional.cross_entropy(model.train()(adv), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_best_and_last_in_one_folder_are_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--method", "natural", "--run-dir", str(run), *TINY, "--epochs", "1"]) == 0
    capsys.readouterr()
    best, last = evaluate(tmp_path / "e.json", run, "--attacks", "clean")
    assert capsys.readouterr().out.count("img/s)") == 1
    assert best == {**last, "checkpoint": "best"}


def test_a_transfer_attack_is_made_on_the_source_and_counted_on_the_model() -> None:
    model, source = tiny_cnn(seed=0).eval(), tiny_cnn(seed=1).eval()
    images = ImageSet(
        torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    )
    with torch.no_grad():
        images.labels.copy_(model(images.images / 255).argmax(1))
    attack = parse_attack("fgsm", eps=0.01, step_size=0.05)
    x = (images.images / 255).requires_grad_()
    torch.nn.functional.cross_entropy(source(x), images.labels).backward()
    assert x.grad is not None
    x_adv = (x + 0.01 * x.grad.sign()).clamp(0, 1).detach()
    expected = int((model(x_adv).argmax(1) == images.labels).sum())
    got = measure(model, images, attack, device=CPU, batch_size=16, seed=0, source=source)
    assert got.correct == expected
    assert got.correct > measure(model, images, attack, device=CPU, batch_size=16, seed=0).correct


def test_a_transferred_apgd_goes_on_after_it_fools_its_source() -> None:
    model, source = tiny_cnn(seed=0).eval(), tiny_cnn(seed=1).eval()
    x = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    labels = model(x / 255).argmax(1)
    attack = parse_attack("apgd-ce8", eps=0.03, step_size=0.03)
    draws, ascent = ImageDraws.of(0, torch.arange(40), CPU), Ascent(source, final=False)
    found = attack.run(ascent, x / 255, labels, draws=draws).x_adv
    want = int((model(found).argmax(1) == labels).sum())
    images = ImageSet(x, labels)
    got = measure(model, images, attack, device=CPU, batch_size=16, seed=0, source=source)
    assert got.correct == want
    matrix = transfer_matrix(
        {"source": source, "model": model}, images, attack, device=CPU, batch_size=16, seed=0
    )
    assert matrix.accuracy[0][1] == want / 40
    ended = attack.run(Ascent(source), x / 255, labels, draws=draws).x_adv
    assert want < int((model(ended).argmax(1) == labels).sum())


def test_a_transferred_distance_is_that_of_an_image_that_fools_the_model() -> None:
    model, source = tiny_cnn(seed=0).eval(), tiny_cnn(seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        for parameter in source.parameters():  # much like the model
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        labels = source(x / 255).argmax(1)
        labels[:10] += 1  # wrong on both as they are
        labels %= 10
        right = model(x / 255).argmax(1) == labels
    attack = parse_attack("deepfool5", eps=0.1, step_size=0.1)
    got = measure(model, ImageSet(x, labels), attack, device=CPU, batch_size=16, seed=0, source=source)
    assert got.distances is not None
    stands = unpack_bits(got.robust_bits, 60)
    assert 0 < int(stands.sum()) < int(right.sum()) < 60
    for distance, clean, robust in zip(got.distances, right.tolist(), stands.tolist(), strict=True):
        assert (distance == 0) == (not clean)
        if clean:
            assert (distance is None) == robust


def test_images_that_do_not_stand_any_more_are_not_attacked_and_count_as_broken() -> None:
    model = tiny_cnn().eval()
    images = ImageSet(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (10,)))
    attack, seen = parse_attack("pgd2", eps=0.001, step_size=0.001), []
    standing = torch.arange(10) % 3 == 0
    got = measure(
        model, images, attack, device=CPU, batch_size=3, seed=0, standing=standing, advance=seen.append
    )
    assert sum(seen) == 4
    alone = ImageSet(images.images[standing], images.labels[standing])
    assert got.correct == measure(model, alone, attack, device=CPU, batch_size=3, seed=0).correct
    assert not bool((unpack_bits(got.robust_bits, 10) & ~standing).any())
    nobody = measure(
        model, images, attack, device=CPU, batch_size=3, seed=0, standing=torch.zeros(10, dtype=torch.bool)
    )
    assert nobody.accuracy == 0
    for found, attacked in ((got, 4), (nobody, 0)):
        assert found.images_per_s * found.seconds == pytest.approx(attacked)


def test_a_misclassified_image_is_not_led_back_to_its_label() -> None:
    """By an attack towards a class, between which and the image's own the label lies."""

    def ramp(x: torch.Tensor) -> torch.Tensor:
        light = x.mean((1, 2, 3))
        return torch.stack((0.4 - light, 0.1 - 10 * (light - 0.5).abs(), light - 0.6), 1)

    class Ramp(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ramp(x)

    images = ImageSet(torch.full((2, 1, 4, 4), 0, dtype=torch.uint8), torch.tensor([1, 0]))
    attack = parse_attack("fgsm@least", eps=0.5, step_size=0.1)
    got = measure(Ramp(), images, attack, device=CPU, batch_size=2, seed=0)
    assert not unpack_bits(got.robust_bits, 2)[0]


def test_no_answer_is_no_right_answer() -> None:
    class Diverged(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :3] * torch.nan

    images = ImageSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    for name in ("clean", "pgd2", "apgd-ce2", "square3"):
        attack = parse_attack(name, eps=0.1, step_size=0.1)
        assert measure(Diverged(), images, attack, device=CPU, batch_size=2, seed=0).accuracy == 0, name


@pytest.mark.parametrize("name", ["apgd-t", "fast-autoattack", "autoattack", "transfer-apgd-t"])
def test_too_few_classes_are_said_before_anything_is_measured(name: str) -> None:
    columns = parse_columns(f"clean,{name}", eps=0.1, step_size=0.1, norm="linf", amp="off")
    check_target_classes(columns, 4)
    with pytest.raises(UserError, match="dlr-t needs 4 classes, the network has 3"):
        check_target_classes(columns, 3)
