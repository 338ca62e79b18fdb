"""Averages over epochs and with equal weights, and their running statistics, against the releases' rules."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.networks import tiny_cnn
from support.same_run import assert_same_run, rows
from support.world_training import SIZES, batches, network
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from fastdynat.attack_engine.network_modes import keep_in_eval_mode
from fastdynat.commands.main import main
from fastdynat.config import OptimConfig
from fastdynat.config.train_checks import check_optim
from fastdynat.data import Batch, dataset_info
from fastdynat.errors import UserError
from fastdynat.evaluation import Stopped
from fastdynat.methods.configs import default_config
from fastdynat.runs import load_network
from fastdynat.training.average import AverageRule, WeightAverage
from fastdynat.training.average_share import average_note, run_average_note
from fastdynat.training.recomputed_statistics import recompute_statistics
from fastdynat.training.resolve_optim import resolved_optim
from fastdynat.training.run_average import RunAverage, average_rule

TINY = ["--method", "natural", "--train-size", "96", "--val-size", "20", "--batch-size", "32", "--quiet"]
TINY += ["--schedule", "constant", "--compile", "off", "--device", "cpu"]


def shaken(model: nn.Module, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("start", [1, 3])
def test_over_epochs_it_is_ikls(start: int) -> None:
    """Its script: a copy of checkpoint `start`, counted from 1, then tau times the old, of every tensor."""
    model, tau = tiny_cnn(dtype=torch.float64), 0.9
    optim: Any = OptimConfig(ema=tau, ema_every="epoch", ema_from=start - 1, epochs=8)
    average = WeightAverage(model, average_rule(optim, 8, 391))
    want: dict[str, Tensor] = {}
    for epoch in range(1, 9):
        state = shaken(model, epoch)
        average.update()
        if epoch == start:
            want = dict(state)
        elif epoch > start:
            want = {key: (1 - tau) * value + tau * want[key] for key, value in state.items()}
    for key, value in average.module.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [0, 2])
def test_per_step_from_an_epoch_on_it_is_idbhs(start: int) -> None:
    """Its loop: the weights of the epoch's first step, then 0.001 of each step's."""
    model, steps = tiny_cnn(dtype=torch.float64), 4
    optim: Any = OptimConfig(ema=0.999, ema_from=start, epochs=5)
    average = WeightAverage(model, average_rule(optim, 5, steps))
    held: list[Tensor] = []
    for epoch in range(5):
        for step in range(steps):
            shaken(model, steps * epoch + step)
            average.update()
            now = [p.detach().clone() for p in model.parameters()]
            if epoch == start and step == 0:
                held = now
            elif epoch >= start:
                held = [0.999 * old + 0.001 * new for old, new in zip(held, now, strict=True)]
    for p, q in zip(average.module.parameters(), held, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [0, 3])
def test_with_equal_weights_it_is_torchs_averaged_model(start: int) -> None:
    model = tiny_cnn(dtype=torch.float64)
    optim: Any = OptimConfig(swa=True, ema_from=start, epochs=9)
    ours, theirs = WeightAverage(model, average_rule(optim, 9, 391)), AveragedModel(model, use_buffers=True)
    states = []
    for epoch in range(9):
        states.append(shaken(model, epoch))
        ours.update()
        if epoch >= start:
            theirs.update_parameters(model)
    for (key, value), other in zip(
        ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True
    ):
        if "num_batches" not in key:
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(value, torch.stack([s[key] for s in states[start:]]).mean(0))


def test_recomputed_statistics_are_torchs_and_draw_nothing() -> None:
    model = tiny_cnn(dropout=0.5, dtype=torch.float64)
    model[1].momentum, model[4].training = 0.01, False  # type: ignore[assignment]
    want, kept = copy.deepcopy(model), [*batches_of(3)]
    want[3] = nn.Identity()
    update_bn([batch.x for batch in kept], want)
    state, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    recompute_statistics(model, iter(kept))
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model[1], key), getattr(want[1], key), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert (model[1].momentum, model[1].training, model[4].training) == (0.01, True, False)


def test_frozen_statistics_are_not_recomputed() -> None:
    model = tiny_cnn(dtype=torch.float64)
    shaken(model, 0)
    keep_in_eval_mode(model[1])
    before = copy.deepcopy(model[1].state_dict())
    recompute_statistics(copy.deepcopy(model), batches_of(2))
    recompute_statistics(model, batches_of(2))
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())
    assert not model[1].training


def batches_of(count: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        x = torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield Batch(x, torch.zeros(16, dtype=torch.int64), torch.arange(16))


def test_an_interrupted_pass_leaves_the_statistics_from_before() -> None:
    model, asked = tiny_cnn(dtype=torch.float64), iter([False, True])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Stopped):
        recompute_statistics(model, batches_of(3), lambda: next(asked))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[1].training


def _recomputed() -> Tensor:
    module = network(1, "batch")
    recompute_statistics(module, batches(0, 1))
    (layer,) = (part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    assert int(layer.num_batches_tracked) == len(SIZES)
    return torch.cat([layer.running_mean, layer.running_var])


def test_two_processes_recompute_the_statistics_of_one(ranks: Any) -> None:
    alone = _recomputed()
    for found in ranks(2)(_recomputed):
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_the_end_of_an_epoch_may_come_twice() -> None:
    """A run that is stopped after an epoch and before its validation ends the epoch again when it goes on."""

    class Loader:
        steps_per_epoch = 3

        def epoch(self, epoch: int) -> Iterator[Batch]:
            return batches_of(2)

    class Nets:
        ema = WeightAverage(tiny_cnn(dtype=torch.float64), AverageRule(0.9))

    optim: Any = OptimConfig(ema=0.9, ema_every="epoch", ema_buffers="recompute", burn_in=2, epochs=6)
    nets, loader = Nets(), Loader()
    average = RunAverage(optim, nets, loader)  # type: ignore[arg-type]
    average.restart(burning_in=False)
    for epoch in (2, 3):
        for _ in range(2):
            average.end_epoch(epoch, lambda: False)
            state = copy.deepcopy(nets.ema.module.state_dict())
        assert nets.ema.updates == epoch - 1
        average.end_epoch(epoch, lambda: False)
        assert all(torch.equal(value, state[key]) for key, value in nets.ema.module.state_dict().items())
    average.restart(burning_in=True)
    average.end_epoch(0, lambda: False)
    assert nets.ema.updates == 1


def train(run: Path, *flags: str, code: int = 0) -> Path:
    assert main(["train", "--run-dir", str(run), *TINY, *flags]) == code
    return run


def test_a_run_with_equal_weights_saves_their_mean(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--swa", "--ema-from", "1", "--epochs", "3", "--stop-after", "2")
    second = load_file(run / "last" / "model_raw.safetensors")
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    third, mean = (load_file(run / "last" / f"{name}.safetensors") for name in ("model_raw", "model"))
    for key, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (second[key] + third[key]) / 2)
    assert not torch.equal(second["net.linear.weight"], third["net.linear.weight"])


@pytest.mark.parametrize("flags", [["--ema", "0.9", "--ema-every", "epoch"], ["--swa"], ["--ema", "0.9"]])
def test_a_run_whose_average_has_recomputed_statistics_resumes_exactly(
    flags: list[str], tmp_path: Path
) -> None:
    given = [*flags, "--ema-buffers", "recompute", "--epochs", "3", "--opt", "adamw", "--lr", "0.01"]
    whole = train(tmp_path / "whole", *given)
    parts = train(tmp_path / "parts", *given, "--stop-after", "1")
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    assert_same_run(whole, parts)
    exported, _ = load_network(whole / "last" / "model.safetensors")
    average, raw = (load_file(whole / "last" / f"{name}.safetensors") for name in ("model", "model_raw"))
    assert int(average["net.features.1.num_batches_tracked"]) == 3
    assert not torch.equal(average["net.features.1.running_var"], raw["net.features.1.running_var"])
    assert torch.equal(
        exported.state_dict()["net.features.1.running_var"], average["net.features.1.running_var"]
    )
    assert rows(whole)[-1]["val_clean_acc"] is not None


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"swa": True, "ema": 0.9}, "swa and ema 0.9 are two kinds of weight average"),
        ({"swa": True, "ema_warmup": 0.1}, "ema_warmup 0.1 and swa both set when averaging starts"),
        ({"ema": 0.9, "ema_from": 3, "ema_warmup": 0.1}, "ema_warmup 0.1 and ema_from 3 both set"),
        ({"ema_from": 3}, "ema_from 3: there is no weight average"),
        ({"ema_every": "epoch"}, "ema_every epoch: there is no weight average"),
        ({"ema": 0.9, "ema_from": 8, "epochs": 10, "burn_in": 2}, "below the 8 epochs of the method, got 8"),
        ({"swa": True, "ema_from": 100}, "ema_from must be below the 100 epochs of the method, got 100"),
    ],
)
def test_what_excludes_each_other_is_refused(optim: dict[str, Any], message: str) -> None:
    config, info = default_config("madry"), dataset_info("cifar10")
    assert info is not None
    asked = replace(config.optim, **optim)

    def resolved() -> None:
        check_optim(asked)
        resolved_optim(replace(config, optim=asked), info)

    with pytest.raises(UserError, match=message):
        resolved()


def test_statistics_cannot_be_recomputed_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "small-gn", "--swa", "--ema-buffers", "recompute", "--epochs", "2"]
    train(tmp_path / "run", *flags, code=2)
    assert "--ema-buffers recompute: small-gn has no batch norm; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_averages_over_epochs() -> None:
    slow: Any = OptimConfig(ema=0.9, ema_every="epoch", epochs=200)
    note = run_average_note(slow, 391)
    assert note is not None
    assert "until epoch 8 validation sees an average that is mostly the weights of its first epoch" in note
    short = average_note(AverageRule(0.9), epochs=5, updates_per_epoch=1, unit="epoch")
    assert short is not None
    assert "--ema 0.9 over 5 epochs" in short
    equal: Any = OptimConfig(swa=True, epochs=5)
    assert run_average_note(equal, 391) is None
    long = average_note(AverageRule(0.9999), epochs=1, updates_per_epoch=3300, unit="step")
    assert long is not None
    assert long.endswith("or --ema 0.9991 or less")
