"""The smaller last batch of an epoch compiles nothing, and `--drop-last` leaves it out of everything."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from support.fallbacks import CollectedIn
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step
from support.method_variants import VARIANTS, flags, teacher  # noqa: F401
from torch import Tensor
from torch._dynamo.utils import counters

from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.execution import compiling
from fastdynat.execution.graphed_call import GraphedCall
from fastdynat.execution.uncompiled import is_uncompiled, uncompiled
from fastdynat.methods import Dynat, DynatOptions
from fastdynat.training import trainer

SIZES = ["--val-size", "20", "--batch-size", "32", "--quiet"]
DYNAT = ["--method", "dynat", "--steps", "2", *SIZES]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The number of Dynamo's graphs; the traced code runs eagerly, which saves compile time."""
    real: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, options, **kwargs: real(fn, backend="eager", **kwargs))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs("cxx")
def test_two_epochs_with_a_smaller_last_batch_compile_what_whole_batches_do(
    traced: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, updates, said = {}, {}, {}
    for images in (64, 80):
        counters.clear()
        run = tmp_path / str(images)
        command = [
            "train",
            "--run-dir",
            str(run),
            *DYNAT,
            "--epochs",
            "2",
            "--compile",
            "default",
            "--check-fidelity",
            "20",
        ]
        assert main([*command, "--train-size", str(images)]) == 0
        made[images], updates[images] = traced(), rows(run)[-1]["global_step"]
        said[images] = capsys.readouterr().err.count(
            "the last 16 images of an epoch are a partial batch and run without"
        )
    assert made[80] == made[64] > 0
    assert updates == {64: 4, 80: 6}
    assert said == {64: 0, 80: 1}


@needs("cxx")
def test_the_smaller_batch_trains_as_it_would_without_compilation(
    traced: Callable[[], int], tmp_path: Path
) -> None:
    kept = []
    for mode in ("off", "default"):
        run = tmp_path / mode
        assert (
            main(
                [
                    "train",
                    "--run-dir",
                    str(run),
                    *DYNAT,
                    "--epochs",
                    "1",
                    "--train-size",
                    "80",
                    "--compile",
                    mode,
                ]
            )
            == 0
        )
        kept.append(rows(run)[0])
    for name in ("guide_loss", "loss", "train_adv_acc"):
        assert kept[0][name] == pytest.approx(kept[1][name], rel=1e-4)


def test_a_smaller_batch_is_neither_captured_nor_replayed_and_is_the_same_step() -> None:
    """Sizes 16, 16, 7: with `whole` the 7 run as they are; the numbers are those of a step without graphs."""

    def state(whole: int | None, recorder: SimulatedRecorder | None) -> Tensor:
        said: list[str] = []
        step = make_step(
            Dynat(DynatOptions()), "cpu", recorder=recorder, whole=whole, fallbacks=CollectedIn(said)
        )
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(5)
        for _ in range(6):
            for size in (16, 16, 7):
                x, labels = (
                    torch.rand(size, 3, 8, 8, generator=generator),
                    torch.randint(10, (size,), generator=generator),
                )
                step(Batch(x, labels, torch.arange(size)))
        graphs_of_its_own = recorder is not None and whole is not None
        assert len(said) == graphs_of_its_own
        assert all("without CUDA graphs; --drop-last" in text for text in said)
        return torch.cat(
            [t.detach().double().flatten() for t in step.networks.raw["model"].state_dict().values()]
        )

    every, large = SimulatedRecorder(), SimulatedRecorder()
    want = state(None, None)
    assert torch.equal(state(None, every), want)
    assert torch.equal(state(16, large), want)
    assert (every.captured, large.captured) == (2, 1)


def test_standing_aside_is_over_after_a_failure() -> None:
    calls: list[str] = []
    call = GraphedCall(lambda x: x + 1, SimulatedRecorder(), calls.append)

    def fail() -> None:
        assert is_uncompiled()
        assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), uncompiled():
        fail()
    assert not is_uncompiled()
    assert call._captured == {}
    compiled = compiling.compile_whole(
        torch.sin, mode="default", what="the sine", fallbacks=CollectedIn(calls)
    )
    with uncompiled():
        assert torch.equal(compiled(torch.ones(2)), torch.sin(torch.ones(2)))
    assert compiled._known == set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("loader", ["resident", "torch", pytest.param("dali", marks=needs("dali"))])
def test_drop_last_shortens_the_epoch_for_every_loader(loader: str, tmp_path: Path) -> None:
    run, paused = tmp_path / "run", tmp_path / "paused"
    command = [
        *DYNAT,
        "--train-size",
        "80",
        "--drop-last",
        "--loader",
        loader,
        "--epochs",
        "2",
        "--schedule",
        "cosine",
    ]
    assert main(["train", "--run-dir", str(run), *command]) == 0
    assert [row["global_step"] for row in rows(run)] == [2, 4]
    assert "drop_last: true" in (run / "config.yaml").read_text()
    # The schedule is that of four updates: the last one's rate is the cosine's at 3/4.
    assert rows(run)[-1]["lr"] == pytest.approx(
        0.03 * 0.5 * (1 + torch.cos(torch.tensor(3 * torch.pi / 4))).item(), rel=1e-4
    )
    assert main(["train", "--run-dir", str(paused), *command, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(paused), "--quiet"]) == 0
    one, other = (torch.load(path / "last" / "state.pt", weights_only=True) for path in (run, paused))
    assert one["loader"]["epoch_images"] == other["loader"]["epoch_images"] == 64
    same = (run / "last" / "model.safetensors").read_bytes() == (
        paused / "last" / "model.safetensors"
    ).read_bytes()
    assert same


def test_the_images_left_out_are_others_in_each_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    real = trainer.Trainer._train_epoch

    def watched(self: Any, *args: Any) -> None:
        epoch = self.loader.epoch

        def told(*numbers: int) -> Iterator[Batch]:
            seen.append(set())
            for batch in epoch(*numbers):
                assert len(batch.labels) == 32
                seen[-1].update(batch.indices.tolist())
                yield batch

        monkeypatch.setattr(self.loader, "epoch", told)
        real(self, *args)
        monkeypatch.setattr(self.loader, "epoch", epoch)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", watched)
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "r"),
                *DYNAT,
                "--epochs",
                "3",
                "--train-size",
                "80",
                "--drop-last",
            ]
        )
        == 0
    )
    assert [len(images) for images in seen] == [64, 64, 64]
    assert len(set().union(*seen)) == 80


def test_another_drop_last_is_refused_on_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(run),
                *DYNAT,
                "--epochs",
                "2",
                "--train-size",
                "80",
                "--stop-after",
                "1",
            ]
        )
        == 0
    )
    assert main(["train", "--resume", str(run), "--drop-last"]) == 2
    assert "drop_last is False in this run, not True" in capsys.readouterr().err


def test_a_run_from_before_there_was_drop_last_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(run),
                *DYNAT,
                "--epochs",
                "2",
                "--train-size",
                "80",
                "--stop-after",
                "1",
            ]
        )
        == 0
    )
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        "".join(line for line in text.splitlines(True) if "drop_last" not in line)
    )
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert [row["global_step"] for row in rows(run)] == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_last_with_every_method(variant: str, teacher: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    command = [
        "train",
        "--run-dir",
        str(run),
        *flags(variant, teacher),
        *SIZES,
        "--epochs",
        "2",
        "--train-size",
        "80",
    ]
    assert main([*command, "--drop-last"]) == 0
    assert [row["global_step"] for row in rows(run)] == [2, 4]
