"""The same paths on a CUDA device. Skipped, with the reason, where there is none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import needs
from support.networks import tiny_cnn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import parse_attack
from fastdynat.commands.main import main

pytestmark = [pytest.mark.gpu, needs("gpu")]
TINY = [
    "--train-size",
    "200",
    "--val-size",
    "20",
    "--batch-size",
    "64",
    "--steps",
    "3",
    "--epochs",
    "2",
    "--quiet",
]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_equals_the_cpus(norm: str) -> None:
    model = tiny_cnn(dtype=torch.float64)
    x, y = torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
    spec = PGDSpec(0.1, 0.02, 10, norm=norm, start="none")
    on_cpu = pgd(model, x, AttackGoal("ce", y), spec).x_adv
    on_gpu = pgd(model.cuda(), x.cuda(), AttackGoal("ce", y.cuda()), spec).x_adv
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *(
            (name, "linf")
            for name in (
                "mim3",
                "pgd3@random",
                "cw3-k0",
                "deepfool-linf5",
                "apgd-ce10",
                "apgd-t5",
                "fab-t",
                "square50",
            )
        ),
        *((name, "l2") for name in ("cwl2-2x20", "deepfool5", "fab", "apgd-dlr5", "square50")),
        *((name, "l1") for name in ("pgd3-2", "apgd-ce10", "fab-min", "square50")),
        *((name, "l0") for name in ("pgd3", "sigmazero20")),
    ],
)
def test_every_attack_of_the_evaluation_runs(name: str, norm: str) -> None:
    """On channels-last images, with all of its tensors on the device."""
    model = tiny_cnn().eval().cuda()
    x = torch.rand(6, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    attack = parse_attack(name, eps={"linf": 0.1, "l2": 0.5}.get(norm, 5.0), step_size=0.1, norm=norm).search
    assert attack is not None
    labels, generator = model(x).argmax(1), torch.Generator("cuda").manual_seed(1)
    result = attack(Ascent(model), x, labels, generator=generator)
    assert result.x_adv.device == x.device
    assert 0 <= float(result.x_adv.min()) <= float(result.x_adv.max()) <= 1


@pytest.mark.parametrize("compile_mode", ["off", "default"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_graphs_attack_as_the_plain_engine_does(dtype: torch.dtype | None, compile_mode: str) -> None:
    model = tiny_cnn().cuda()
    switches = AttackSwitches(dtype=dtype, channels_last=dtype is not None, compile=compile_mode)
    example = torch.rand(2, 3, 8, 8, device="cuda")
    plain = AttackEngine(model, example, switches=switches)
    graphed = AttackEngine(model, example, switches=replace(switches, graphs=True))
    spec = PGDSpec(0.1, 0.02, 5)
    for size in (16, 16, 16, 16, 16, 7, 7, 7, 7, 16):
        x, goal = (
            torch.rand(size, 3, 8, 8, device="cuda"),
            AttackGoal("ce", torch.randint(10, (size,), device="cuda")),
        )
        torch.manual_seed(size)
        want = plain.run(x, goal, spec).x_adv
        torch.manual_seed(size)
        got = graphed.run(x, goal, spec).x_adv
        assert ((got - x).abs() <= 0.1 + 1e-6).all()
        # Rounding may flip the sign of a gradient that is noise.
        assert ((got - want).abs() > 1e-5).float().mean() < 0.02
        assert not torch.equal(got, graphed.run(x, goal, spec).x_adv)  # another start
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        plain.refresh()
        graphed.refresh()


FLAGS = [
    [],
    ["--amp", "off"],
    ["--amp", "fp16"],
    ["--amp", "bf16", "--compile", "default"],
    ["--graphs", "off"],
    ["--guide-stream", "off"],
    ["--method", "madry", "--attack-bn", "train"],
    ["--loader", "torch", "--workers", "2"],
    ["--ema", "0.9", "--clip-grad", "1", "--early-steps", "1"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_run_trains_stops_resumes_and_evaluates(tmp_path: Path, flags: list[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "eval.json"
    assert main(["train", "--run-dir", str(run), *TINY, *flags, "--device", "cuda", "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "madry" in flags or rows[1]["guide_loss"] < rows[0]["guide_loss"]
    assert main(["eval", str(run), "--attacks", "clean,pgd3", "--json", str(out)]) == 0
    assert len(json.loads(out.read_text())["results"]) == 2


def test_a_run_moves_from_gpu_to_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--device", "cuda", "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(run), "--device", "cpu"]) == 0
    assert "not bit for bit" in capsys.readouterr().err
