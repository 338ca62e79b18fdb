"""Evaluation split over ranks: image by image the result of one process."""

import io
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import needs
from rich.console import Console
from support.networks import tiny_cnn
from support.tiny_run import TINY
from support.torchrun import torchrun
from torch import Tensor, nn

import fastdynat
from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.commands.evaluate import columns
from fastdynat.commands.evaluate.measure_runs import evaluate_runs
from fastdynat.commands.evaluate.reference_autoattack import run_reference
from fastdynat.commands.main import main
from fastdynat.config.eval_config import EvalConfig
from fastdynat.data import ImageSet
from fastdynat.distributed import world
from fastdynat.errors import UserError
from fastdynat.evaluation import Measurement, Stopped, measure
from fastdynat.evaluation.measure_on_ranks import measure_on_ranks
from fastdynat.evaluation.outcome import pack_bits, unpack_bits

CPU = torch.device("cpu")
IMAGES = 23


def some_pixels() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (IMAGES, 3, 8, 8), generator=generator, dtype=torch.uint8)


def some_network() -> nn.Module:
    """Logits of mean 0 over the images, so that they are of many classes."""
    network, x = tiny_cnn(1).eval(), some_pixels() / 255
    with torch.no_grad():
        network[-1].bias -= network(x).mean(0)
    return network


def some_images() -> ImageSet:
    with torch.no_grad():
        labels = some_network()(some_pixels() / 255).argmax(1)
    return ImageSet(some_pixels(), labels.where(torch.arange(IMAGES) % 6 > 0, labels.roll(1)))


def named(name: str) -> NamedAttack:
    return parse_attack(name, eps=4 / 255, step_size=1 / 255)


def measured(
    attack: NamedAttack, standing: Tensor | None = None, batch_size: int = 5, fails: tuple[int, int] = (0, 0)
) -> Measurement:
    """By all ranks; `fails`: a rank, and the batch size above which its memory runs out."""
    network, images = some_network(), some_images()

    rank = world().rank

    def run(own: Tensor | None, size: int) -> Measurement:
        if fails[1] and rank == fails[0] and size > fails[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(network, images, attack, device=CPU, batch_size=size, seed=3, standing=own)

    return measure_on_ranks(run, attack, images.labels, batch_size=batch_size, standing=standing)


def assert_same(found: Measurement, one: Measurement) -> None:
    assert found.images == one.images == IMAGES
    assert found.robust_bits == one.robust_bits
    assert (found.accuracy, found.ci, found.per_class) == (one.accuracy, one.ci, one.per_class)
    assert (found.gradients, found.zero_grad_share) == (one.gradients, one.zero_grad_share)
    assert (found.distances is None) == (one.distances is None)
    if found.distances is not None and one.distances is not None:
        assert [d is None for d in found.distances] == [d is None for d in one.distances]
        pairs = [(a, b) for a, b in zip(found.distances, one.distances, strict=True) if a is not None]
        torch.testing.assert_close(*torch.tensor(pairs).T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["clean", "pgd20", "pgd5-3", "cw10", "apgd-t", "square100", "fab-min", "deepfool"]
)
def test_two_ranks_find_what_one_process_finds(name: str, ranks: Any) -> None:
    one = measured(named(name))
    first, other = ranks(2)(measured, named(name))
    assert 0 < one.correct < IMAGES or name in ("fab-min", "deepfool")
    assert first == other
    assert_same(first, one)


def test_only_standing_images_are_dealt_out(ranks: Any) -> None:
    standing = torch.zeros(IMAGES, dtype=torch.bool)
    standing[[3, 4, 11]] = True
    one = measured(named("pgd5-3"), standing)
    found = ranks(2)(measured, named("pgd5-3"), standing)
    assert found[0] == found[1]
    assert_same(found[0], one)
    assert found[0].images_per_s * found[0].seconds == pytest.approx(3)
    standing[[3, 4]] = False  # one image: a rank has nothing to do
    one = measured(named("fab-min"), standing)
    for part in ranks(2)(measured, named("fab-min"), standing):
        assert_same(part, one)
    for part in ranks(2)(measured, named("pgd20"), torch.zeros(IMAGES, dtype=torch.bool)):
        assert (part.correct, part.gradients) == (0, None)


@dataclass(frozen=True)
class BatchNoise:
    """An attack of another package: its noise is drawn for the batch as a whole."""

    eps: float = 0.3
    norm: str = "linf"

    def __call__(
        self, ascent: Ascent, x: Tensor, labels: Tensor, *, generator: torch.Generator, tick: Any
    ) -> AttackResult:
        noise = torch.rand(x.shape, generator=generator) * 2 - 1
        return AttackResult((x + self.eps * noise).clamp(0, 1), torch.tensor(1), len(x))


def test_an_attack_that_draws_per_batch_gets_the_batches_of_one_process(ranks: Any) -> None:
    attack = NamedAttack("noise", BatchNoise())
    assert not attack.draws_per_image
    one = measured(attack)
    found = ranks(2)(measured, attack)
    assert found[0] == found[1]
    assert_same(found[0], one)
    assert measured(attack, batch_size=6).robust_bits != one.robust_bits


def test_memory_may_run_out_on_one_rank(ranks: Any) -> None:
    for part in ranks(2)(measured, named("pgd20"), None, 12, (1, 4)):
        assert_same(part, measured(named("pgd20")))
        assert part.batch_size == 3
    attack = NamedAttack("noise", BatchNoise())
    for part in ranks(2)(measured, attack, None, 12, (1, 4)):  # all start again with the batches of 3
        assert_same(part, measured(attack, batch_size=3))


def stopped_on(rank: int) -> str:
    network, images, attack = some_network(), some_images(), named("pgd20")

    stop = world().rank == rank

    def run(own: Tensor | None, size: int) -> Measurement:
        return measure(
            network,
            images,
            attack,
            device=CPU,
            batch_size=size,
            seed=3,
            standing=own,
            should_stop=lambda: stop,
        )

    try:
        measure_on_ranks(run, attack, images.labels, batch_size=5)
    except Stopped:
        return "stopped"
    return "done"


def test_a_stop_on_one_rank_stops_all(ranks: Any) -> None:
    assert ranks(2)(stopped_on, 1) == ["stopped", "stopped"]
    assert ranks(2)(stopped_on, 7) == ["done", "done"]


def test_one_process_is_not_changed() -> None:
    given = []

    def run(own: Tensor | None, size: int) -> Measurement:
        given.append((own, size))
        return measured(named("clean"))

    assert measure_on_ranks(run, named("clean"), some_images().labels, batch_size=9).images == IMAGES
    assert given == [(None, 9)]
    assert pack_bits(unpack_bits("ff80", 9)) == "ff80"


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--method", "madry", "--run-dir", str(run), *TINY, "--epochs", "6"]) == 0
    return run


def evaluated(run: Path, attacks: str, **keys: Any) -> tuple[list[dict[str, Any]], str]:
    """The records of a rank, and what it printed; RUN/NOISE.py:Noise draws per batch."""
    text = io.StringIO()
    config = EvalConfig(attacks=attacks, checkpoints="last", **{"num_images": 40, "batch_size": 9, **keys})
    console = Console(file=text, width=200)
    return evaluate_runs([run], config, console), text.getvalue()


def verdicts(records: list[dict[str, Any]]) -> Any:
    """Everything but times and batch sizes."""
    left_out = ("seconds", "images_per_s", "batch_size", "cached")
    if isinstance(records, list):
        return [verdicts(record) for record in records]
    if isinstance(records, dict):
        return {key: verdicts(value) for key, value in records.items() if key not in left_out}
    return records


def copied(trained: Path, folder: Path) -> Path:
    return shutil.copytree(trained, folder / "run", symlinks=True)


NOISE = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Noise:
    eps: float
    norm: str = "linf"

    def __call__(self, ascent, x, labels, *, generator, tick):
        return (x + self.eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
"""


def test_the_command_finds_what_one_process_finds(trained: Path, tmp_path: Path, ranks: Any) -> None:
    (tmp_path / "noise.py").write_text(NOISE)
    attacks = f"clean,pgd5,{tmp_path}/noise.py:Noise"
    run, file = copied(trained, tmp_path), tmp_path / "found.json"
    keys: dict[str, Any] = {"cache": "off", "num_images": 16, "batch_size": 5}
    one, table = evaluated(run, attacks, **keys)
    (first, printed), (other, silent) = ranks(2)(_with_keys, run, attacks, {**keys, "json": str(file)})
    assert verdicts(first) == verdicts(other) == verdicts(one)
    assert silent == ""
    assert "pgd5" in printed
    assert "pgd5" in table
    stored = json.loads(file.read_text())
    assert verdicts(stored["results"]) == verdicts(json.loads(json.dumps(one)))
    assert 0 < one[0]["attacks"][1]["correct"] < one[0]["attacks"][0]["correct"] < 16
    assert [a["attack"] for a in one[0]["attacks"]] == ["clean", "pgd5", "noise.py:Noise"]


def test_the_masking_checks_of_ranks_are_those_of_one_process(trained: Path, ranks: Any) -> None:
    keys: dict[str, Any] = {"cache": "off", "checks": True, "num_images": 12}
    one, _ = evaluated(trained, "clean", **keys)
    (first, _), (other, _) = ranks(2)(_with_keys, trained, "clean", keys)
    assert verdicts(first) == verdicts(other) == verdicts(one)
    assert len(one[0]["checks"]) > 5


def _with_keys(run: Path, attacks: str, keys: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    return evaluated(run, attacks, **keys)


def _in_short_stages(run: Path) -> list[dict[str, Any]]:
    """fast-autoattack of three quick stages; radii grow so that each finds images on any processor."""

    def stages(norm: str, eps: float) -> list[NamedAttack]:
        radii = {"fgsm": 0.05, "pgd20": 0.08, "square20": 0.2}
        return [parse_attack(name, eps=radius, step_size=radius / 4) for name, radius in radii.items()]

    with patch.object(columns, "stages", stages):
        return evaluated(run, "fast-autoattack", cache="off", eps=0.05)[0]


def test_stages_are_dealt_out_anew(trained: Path, ranks: Any) -> None:
    one = _in_short_stages(trained)
    standing = [stage["correct"] for stage in one[0]["attacks"][0]["stages"]]
    assert all(before > after for before, after in itertools.pairwise([*standing, 0]))
    first, other = ranks(2)(_in_short_stages, trained)
    assert verdicts(first) == verdicts(other) == verdicts(one)


def test_results_are_kept_once_and_for_any_number_of_processes(
    trained: Path, tmp_path: Path, ranks: Any
) -> None:
    run = copied(trained, tmp_path)
    first, other = (records for records, _ in ranks(2)(evaluated, run, "clean,pgd5"))
    files = sorted((run / "evaluations").iterdir())
    assert len(files) == 2
    assert first[0]["cached"] == []
    one, _ = evaluated(run, "clean,pgd5,fgsm")
    assert one[0]["cached"] == ["clean", "pgd5"]
    assert one[0]["attacks"][:2] == first[0]["attacks"] == other[0]["attacks"]
    for records, _ in ranks(2)(evaluated, run, "clean,pgd5,fgsm"):
        assert records[0]["cached"] == ["clean", "pgd5", "fgsm"]
        assert records[0]["attacks"] == one[0]["attacks"]
    assert len(list((run / "evaluations").iterdir())) == 3


def test_shards_are_split_over_ranks(trained: Path, tmp_path: Path, ranks: Any) -> None:
    run = copied(trained, tmp_path)
    whole, _ = evaluated(run, "clean,pgd5,square20", cache="off")
    for shard in ("1/2", "2/2"):
        ranks(2)(_with_keys, run, "clean,pgd5,square20", {"shard": shard})
    united, _ = evaluated(run, "clean,pgd5,square20")
    assert united[0]["cached"] == ["clean", "pgd5", "square20"]
    assert verdicts(united) == verdicts(whole)


def _refused(run: Path, keys: dict[str, Any]) -> str:
    try:
        evaluated(run, "clean", **keys)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _differing(run: Path) -> str:
    return _refused(run, {"seed": world().rank})


def _elsewhere(run: Path) -> str:
    return _refused(run if world().first else run / "missing", {})


def test_what_ranks_cannot_do_is_refused_on_all(trained: Path, ranks: Any) -> None:
    first, other = ranks(2)(_refused, trained, {"num_images": 1, "cache": "off"})
    assert first.startswith("UserError: 1 images cannot be split over 2 processes")
    assert other.startswith("ToldElsewhere")
    first, other = ranks(2)(_differing, trained)
    assert first.startswith("UserError: the ranks differ in --seed: 0 on rank 0")
    assert other.startswith("ToldElsewhere")
    first, other = ranks(2)(_elsewhere, trained)
    assert "the ranks differ in the networks" in first


# In Python, and the authors' AutoAttack


def _of_python(shift: int) -> dict[str, Any] | str:
    images = some_images()
    labels = images.labels if world().first else images.labels.roll(shift)
    try:
        found = fastdynat.evaluate(
            some_network(), (images.images, labels), "clean,pgd5", eps=4 / 255, batch_size=7
        )
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return {name: found.measurements[name].robust_bits for name in found}


def test_the_python_function_splits_too(ranks: Any) -> None:
    one = _of_python(0)
    assert isinstance(one, dict)
    assert one["clean"] != one["pgd5"]
    assert ranks(2)(_of_python, 0) == [one, one]
    first, other = ranks(2)(_of_python, 1)  # each rank with its own part of some data, as a sampler gives it
    assert first.startswith("UserError: the ranks differ in the test images")
    assert other.startswith("ToldElsewhere")


def _of_authors(state: Path | None) -> list[bool]:
    images = some_images()
    x = images.images[:14].float() / 255
    robust, _ = run_reference(
        some_network(),
        x,
        images.labels[:14],
        norm="linf",
        eps=1 / 255,
        seed=3,
        batch_size=4,
        device=CPU,
        state_path=state if world().first else None,
    )
    return robust.tolist()


@pytest.mark.slow
@needs("pyautoattack")
def test_the_authors_attack_takes_turns_at_its_batches(tmp_path: Path, ranks: Any) -> None:
    one = _of_authors(None)
    assert 0 < sum(one) < 14
    assert ranks(2)(_of_authors, tmp_path / "state") == [one, one]
    assert ranks(2)(_of_authors, tmp_path / "state") == [one, one]  # from the state file


@pytest.mark.parametrize(
    "attacks", ["clean,pgd5,square20", pytest.param("clean,fast-autoattack", marks=pytest.mark.slow)]
)
def test_torchrun(trained: Path, tmp_path: Path, attacks: str) -> None:
    run, file = copied(trained, tmp_path), tmp_path / "found.json"
    flags = ("--attacks", attacks, "--num-images", "40", "--checkpoints", "last")
    done = torchrun("eval", run, *flags, "--json", file, options=("--standalone",))
    assert done.code == 0, done.said
    assert done.said.count("accuracy in %") == 1
    found = json.loads(file.read_text())
    one, _ = evaluated(run, attacks, fresh=True)
    assert verdicts(found["results"]) == verdicts(json.loads(json.dumps(one)))
