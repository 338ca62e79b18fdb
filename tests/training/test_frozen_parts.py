"""--freeze: patterns, what stays, and what reads it: optimisers, weight perturbation, averages, modes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from safetensors.torch import load_file
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step, train
from support.method_variants import make_method
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.network_modes import (
    frozen_twin,
    keep_in_eval_mode,
    set_attack_mode,
    unmoved_twin,
)
from fastdynat.commands.main import main
from fastdynat.config import DataConfig, OptimConfig
from fastdynat.data import open_train
from fastdynat.distributed.synchronized_batch_norm import synchronize_batch_norm
from fastdynat.errors import UserError
from fastdynat.models import build_model
from fastdynat.runs import load_network
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.frozen_parts import FrozenParts
from fastdynat.training.optimizers import build_optimizers, local_part

TINY = ["--train-size", "64", "--val-size", "20", "--batch-size", "32", "--steps", "2", "--quiet"]
TINY += ["--device", "cpu", "--epochs", "2"]


def small() -> nn.Module:
    return build_model("small", num_classes=10, image_shape=(1, 8, 8))


def frozen_names(*patterns: str) -> set[str]:
    return set(FrozenParts(small(), patterns).names)


def test_patterns() -> None:
    names = {name for name, _ in small().named_parameters()}
    head = {"net.linear.weight", "net.linear.bias"}
    assert frozen_names("net.linear.*") == frozen_names("linear.*") == frozen_names("^linear") == head
    assert frozen_names("*.bias") == {name for name in names if name.endswith(".bias")}
    assert frozen_names("^(?!(net.)?linear)") == names - head
    assert frozen_names("features.[01].*", "linear.bias") == {
        "net.features.0.weight",
        "net.features.1.weight",
        "net.features.1.bias",
        "net.linear.bias",
    }
    assert frozen_names() == set()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["linear"], "--freeze 'linear' matches none of the 14 parameters, such as net.features.0.weight"),
        (["LINEAR.*"], "matches none"),
        (["*"], "matches all 14 parameters"),
        (["features.*", "linear.*"], "--freeze 'features.\\*' 'linear.\\*' matches all 14"),
        (["^("], "is not a valid regular expression"),
    ],
)
def test_patterns_that_cannot_work(patterns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FrozenParts(small(), patterns)


def partly_frozen() -> nn.Sequential:
    """tiny_cnn with its first convolution and batch norm frozen, and a running statistic to recognise."""
    model: Any = tiny_cnn()
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    model.get_submodule(norms[0]).running_mean += 0.25
    FrozenParts(model, [f"{norms[0]}.*", f"{convolutions[0]}.*"]).freeze()
    return model


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_frozen_batch_norm_stays_in_eval_mode_in_every_copy() -> None:
    model = partly_frozen().train()
    assert [m.training for m in norms_of(model)][:2] == [False, *[True] * (len(norms_of(model)) > 1)][:2]
    twins = [unmoved_twin(model), frozen_twin(model, "train"), frozen_twin(model, "frozen")]
    for twin in (*twins, model):
        first = norms_of(twin)[0]
        assert not first.training
        assert first.running_mean is not None
        assert first.running_mean.data_ptr() == norms_of(model)[0].running_mean.data_ptr()  # type: ignore[union-attr]
    before = norms_of(model)[0].running_mean.clone()  # type: ignore[union-attr]
    x = torch.rand(4, 3, 8, 8)
    for module in (*twins, model):
        module(x)
    assert torch.equal(norms_of(model)[0].running_mean, before)  # type: ignore[arg-type]
    synchronize_batch_norm(model)
    assert torch.isfinite(model.train()(x)).all()
    assert torch.equal(norms_of(model)[0].running_mean, before)  # type: ignore[arg-type]


def test_no_pass_of_an_unmoved_twin_moves_a_running_statistic() -> None:
    torch.manual_seed(0)
    instance = nn.InstanceNorm2d(4, track_running_stats=True, affine=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), instance, nn.Flatten(), nn.Linear(144, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.rand(6, 3, 8, 8)
    logits = unmoved_twin(model)(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(logits, model.train()(x))
    assert not torch.equal(instance.running_mean, before["2.running_mean"])  # type: ignore[arg-type]


def test_an_unmoved_twin_keeps_instance_norm_in_its_own_eval_mode() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm2d(3, track_running_stats=True)

        def train(self, mode: bool = True) -> "Kept":
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).mean((2, 3))

    model, x = Kept().train(), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(unmoved_twin(model)(x), model(x))


def test_only_batch_norm_is_kept_in_eval_mode() -> None:
    layer = nn.Dropout()
    keep_in_eval_mode(layer)
    assert layer.training
    set_attack_mode(layer, "train")
    assert not layer.training


def test_optimisers_hold_the_trained_parameters_only() -> None:
    for options in ({}, {"decay_norms": False}, {"optimizers": "joint"}):
        model, guide = partly_frozen(), tiny_cnn()
        config: Any = OptimConfig(epochs=1, lr=0.1, momentum=0.9, **options)
        optimizers = build_optimizers({"model": model, "guide": guide}, config, torch.tensor(0.1))
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        wanted = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
        assert held == {id(p) for p in wanted}
        assert {id(p) for o in optimizers for p in local_part(o).state} == held


def test_weight_perturbation_moves_what_is_trained() -> None:
    model = partly_frozen()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    awp = WeightPerturbation(model, 0.1)
    x = torch.rand(4, 3, 8, 8)
    with awp.around([model(x).square().sum()]):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not moved & {name for name, p in model.named_parameters() if not p.requires_grad}


def gradient_of_linear_probe(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), labels)
    (found,) = torch.autograd.grad(loss, model.net.linear.weight)  # type: ignore[union-attr,arg-type]
    return found


def test_a_probe_trains_as_logistic_regression_on_the_fixed_features(tmp_path: Path) -> None:
    """One natural step of the last layer alone equals a step computed from features in eval mode."""
    first = tmp_path / "first"
    assert main(["train", "--method", "natural", "--run-dir", str(first), *TINY]) == 0
    run = tmp_path / "run"
    flags = ["--init-from", str(first), "--freeze", "features.*", "--epochs", "1", "--epoch-steps", "1"]
    flags += ["--batch-size", "44", "--train-size", "44", "--lr", "0.5", "--schedule", "constant"]
    flags += ["--weight-decay", "0", "--augment", "none", "--seed", "1"]
    assert main(["train", "--method", "natural", "--run-dir", str(run), *TINY, *flags]) == 0
    model, _ = load_network(first)
    split = open_train("digits", DataConfig().data_dir, val_size=20, seed=1, limit=44)
    images = split.train_images()
    x = images.read(torch.arange(44)).float() / 255
    gradient = gradient_of_linear_probe(model.eval(), x, images.labels)
    expected = model.net.linear.weight - 0.5 * gradient  # type: ignore[union-attr,operator]
    kept, given = load_file(run / "last/model.safetensors"), load_file(first / "best/model.safetensors")
    torch.testing.assert_close(kept["net.linear.weight"], expected.detach(), rtol=1e-4, atol=1e-6)
    for key in given:
        if "linear" not in key:
            assert torch.equal(kept[key], given[key]), key


@pytest.mark.parametrize("name", ["dynat", "trades"])
def test_a_captured_step_keeps_frozen_parts(name: str) -> None:
    """Bit for bit the plain step, with nothing frozen moved, its running statistics included."""
    recorder = SimulatedRecorder()
    options = {"freeze": ("[01].*",), "clip_grad": 0.5}
    graphed = make_step(make_method(name), "cpu", "off", recorder, fallbacks=NoFallbacks(), **options)
    plain = make_step(make_method(name), "cpu", **options)
    before = {key: value.clone() for key, value in plain.networks.raw["model"].state_dict().items()}
    got, want = train(graphed), train(plain)
    assert recorder.replayed > 0
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    after = graphed.networks.raw["model"].state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"6.weight", "6.bias"}


@needs("cxx")
@pytest.mark.slow
def test_compiled_training_with_frozen_parts(tmp_path: Path) -> None:
    runs = []
    for mode in ("off", "default"):
        run = tmp_path / mode
        flags = ["--freeze", "features.[01].*", "--compile", mode, "--attack-bn", "train"]
        assert main(["train", "--method", "trades", "--run-dir", str(run), *TINY, *flags]) == 0
        runs.append(torch.load(run / "last" / "state.pt", weights_only=True)["optimizers"][0]["state"])
    assert len(runs[0]) == len(runs[1]) == 11
