"""Refusals of what the halves of a method return: wrong types, missing losses, values that are no scalars."""

from typing import Any

import pytest
import torch
from torch import nn

import fastdynat
from fastdynat.attacks import AttackGoal
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, Inner, Outer, register_method
from fastdynat.methods.madry import Madry


class Broken(Madry):
    """Madry's training whose halves return `made(loss per image)`, where that is given."""

    inner_made: Any = None
    made: Any = None
    perturbed: Any = None

    def inner(self, nets: Any, batch: Any) -> Any:
        goal = AttackGoal("ce", batch.labels)
        return type(self).inner_made(goal) if type(self).inner_made else Inner(goal)

    def perturb(self, nets: Any, batch: Any, inner: Any, attack: Any) -> Any:
        made = type(self).perturbed
        return made(batch.x) if made else super().perturb(nets, batch, inner, attack)

    def outer(self, nets: Any, batch: Any, inner: Any, attacked: Any) -> Any:
        losses = nn.functional.cross_entropy(nets.model(attacked.x_adv), batch.labels, reduction="none")
        made = type(self).made
        return made(losses) if made else Outer({"model": losses.mean()}, {"loss": losses.mean().detach()})


def train(**made: Any) -> fastdynat.TrainedRun:
    """One epoch by `Broken` with these attributes."""
    try:
        register_method("broken")(type("Broken", (Broken,), {k: staticmethod(v) for k, v in made.items()}))
        images, labels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        return fastdynat.train(
            net, (images, labels), "broken", eps=0.1, epochs=1, batch_size=16, run_dir="run"
        )
    finally:
        METHODS.pop("broken", None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "goal": ({"inner_made": lambda goal: goal}, r"inner returned AttackGoal; return Inner\(goal\)"),
    "tensor": ({"made": lambda v: v.mean()}, "outer returned Tensor; return Outer"),
    "other key": (
        {"made": lambda v: Outer({"loss": v.mean()})},
        "losses of loss, but the method trains model",
    ),
    "untrained guide": (
        {"made": lambda v: Outer({"model": v.mean(), "guide": v.mean()})},
        "losses of model, guide, but the method trains model: give each one loss, and name in `trains`",
    ),
    "no loss": ({"made": lambda v: Outer({})}, "losses of no network, but the method trains model"),
    "per image": (
        {"made": lambda v: Outer({"model": v})},
        r"the loss of model must be a scalar with its graph, got a tensor of shape \(16,\)",
    ),
    "detached": ({"made": lambda v: Outer({"model": v.mean().detach()})}, r"shape \(\) without a graph"),
    "float log": (
        {"made": lambda v: Outer({"model": v.mean()}, {"c": 0.5})},  # type: ignore[dict-item]
        r"c in the logs must be a scalar tensor, got a float: torch.tensor\(0.5\)",
    ),
    "no images": ({"perturbed": lambda x: None}, "perturb returned NoneType; return AttackResult or images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_halves_are_refused(
    case: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("halves"))
    made, message = REFUSED[case]
    with pytest.raises(UserError, match=f"Broken.*{message}") as caught:
        train(**made)
    assert "\n" not in str(caught.value)


def test_perturb_may_return_images(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("halves"))
    assert train(perturbed=lambda x: (x + 0.05).clamp(0, 1)).best["epoch"] == 1
