"""The hot path of trainer and attack runs on the operators, with the same numbers for each backend."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from support.confident_network import confident_model
from support.networks import tiny_cnn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdynat import ops
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import Dynat, DynatOptions
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

CPU = torch.device("cpu")
STEPS = 3


class Counting(TorchDispatchMode):
    """Counts calls of fastdynat's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdynat":
            self.calls[func._opname] += 1
        return func(*args, **kwargs or {})


def dynat_step(norm: str = "linf") -> tuple[TrainStep, Batch]:
    networks = NetworkSet(tiny_cnn(0), tiny_cnn(1), image_shape=(3, 8, 8), device=CPU, attack_bn="eval")
    spec = PGDSpec(0.1, 0.05, STEPS, norm=norm, start="uniform")
    step = TrainStep(
        Dynat(DynatOptions()),
        networks,
        spec,
        OptimConfig(lr=0.1, epochs=1),
        Precision("off", CPU),
        lambda n: 1.0,
    )
    return step, Batch(torch.rand(16, 3, 8, 8), torch.randint(10, (16,)), torch.arange(16))


@needs("ext")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_runs_on_the_operators(norm: str) -> None:
    step, batch = dynat_step(norm)
    with Counting() as counting, ops.use_backend("cpp"):
        step(batch)
    assert counting.calls == {
        "random_start": 1,
        "attack_logit_grad": STEPS,
        f"pgd_step_{norm}": STEPS,
        "dynamic_label_cross_entropy": 2,  # guide and model
    }


@needs("ext")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_of_each_backend_comes_to_the_same_weights(norm: str) -> None:
    weights = {}
    for backend in ("eager", "cpp"):
        torch.manual_seed(3)
        step, batch = dynat_step(norm)
        torch.manual_seed(4)
        with ops.use_backend(backend):
            logs = step(batch)
        weights[backend] = [
            p.detach().clone() for module in step.networks.raw.values() for p in module.parameters()
        ]
        weights[backend].append(torch.stack([logs[key].double() for key in sorted(logs)]))
    # A gradient that is rounding noise may change sign and move its pixel by two steps, hence not 1e-7.
    for eager, cpp in zip(weights["eager"], weights["cpp"], strict=True):
        torch.testing.assert_close(cpp, eager, rtol=1e-3, atol=1e-4)


@needs("ext", "cxx")
@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--compile"], marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_runs_under_each_backend_agree(tmp_path: Path, flags: list[str]) -> None:
    tiny = [
        "--train-size",
        "120",
        "--val-size",
        "40",
        "--batch-size",
        "40",
        "--steps",
        "3",
        "--epochs",
        "2",
        "--quiet",
        *flags,
    ]
    rows = {}
    for backend in ("eager", "cpp"):
        assert main(["train", "--run-dir", str(tmp_path / backend), "--kernels", backend, *tiny]) == 0
        rows[backend] = [
            json.loads(line) for line in (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        ]
    for eager, cpp in zip(rows["eager"], rows["cpp"], strict=True):
        assert cpp["loss"] == pytest.approx(eager["loss"], rel=1e-2)
        assert cpp["guide_loss"] == pytest.approx(eager["guide_loss"], rel=1e-3)
        assert abs(cpp["val_pgd10_acc"] - eager["val_pgd10_acc"]) <= 0.05


@pytest.mark.filterwarnings("ignore:[0-9]+ of 64 gradients were zero")  # which is what is counted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rescaling_ends_underflow_in_half_precision(dtype: torch.dtype) -> None:
    """Zero gradients before and after, for the images that a confident network classifies as labelled."""
    model, x = confident_model(), torch.rand(64, 3, 8, 8)
    with torch.no_grad():
        labels = model(x).argmax(1)
    spec = PGDSpec(8 / 255, 2 / 255, 1, start="none")
    shares = {}
    for rescale in (False, True):
        result = pgd(model, x, AttackGoal("ce", labels), spec, amp_dtype=dtype, rescale=rescale)
        shares[rescale] = float(result.zero_grads) / result.gradients
    if dtype is torch.float16:
        assert shares[False] > 0.3
    assert shares[True] == 0


@pytest.mark.filterwarnings("ignore:[0-9]+ of 64 gradients were zero")  # of DLR, once the label is third
def test_the_rescaled_attack_takes_the_same_steps() -> None:
    model, x, y = (
        tiny_cnn(dtype=torch.float64),
        torch.rand(16, 3, 8, 8, dtype=torch.float64),
        torch.randint(10, (16,)),
    )
    for loss in ("ce", "margin", "dlr"):
        goal, spec = AttackGoal(loss, y), PGDSpec(0.1, 0.03, 4, start="none")  # type: ignore[arg-type]
        plain = pgd(model, x, goal, spec, rescale=False).x_adv
        assert torch.equal(pgd(model, x, goal, spec, rescale=True).x_adv, plain)


def test_the_loss_scale_comes_before_half_precision_rounds() -> None:
    """The guard where images mix in batch norm: what fp16 has flushed to zero cannot be scaled any more."""
    logits = torch.zeros(1, 10, dtype=torch.float16)
    logits[0, 0] = 20
    goal = AttackGoal("ce", torch.tensor([0]))
    assert float(goal.logit_grad(logits).abs().max()) == 0
    scaled = goal.logit_grad(logits, loss_scale=1024.0)
    assert scaled.dtype == torch.float16
    assert bool((scaled != 0).all())


def test_half_precision_images_are_refused() -> None:
    goal = AttackGoal("ce", torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        UserError, match=r"images must be float32 or float64 .* got torch.float16 .* pass amp_dtype"
    ):
        pgd(tiny_cnn(), torch.rand(4, 3, 8, 8).half(), goal, PGDSpec(0.1, 0.05, 1))


@needs("ext")
def test_a_run_that_goes_on_with_other_operators_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    tiny = ["--train-size", "40", "--val-size", "20", "--batch-size", "20", "--steps", "1", "--epochs", "3"]
    monkeypatch.setenv("FASTDYNAT_KERNELS", "eager")
    assert main(["train", "--run-dir", str(run), *tiny, "--stop-after", "1"]) == 0
    assert "operators: eager" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--stop-after", "1"]) == 0
    assert "operators change" not in capsys.readouterr().err
    monkeypatch.delenv("FASTDYNAT_KERNELS")
    assert main(["train", "--resume", str(run)]) == 0
    assert "operators change from eager to cpp (--kernels eager keeps them)" in " ".join(
        capsys.readouterr().err.split()
    )
    starts = json.loads((run / "environment.json").read_text())
    assert [start["operators"] for start in starts] == ["eager", "eager", "cpp"]


@pytest.mark.parametrize("bn", ["train", "frozen"])
def test_rescaling_is_refused_where_images_mix(bn: str) -> None:
    goal = AttackGoal("ce", torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        UserError, match=f"rescale needs images that do not mix: attack BN mode eval, got {bn}"
    ):
        pgd(tiny_cnn(), torch.rand(4, 3, 8, 8), goal, PGDSpec(0.1, 0.05, 1), bn=bn, rescale=True)
