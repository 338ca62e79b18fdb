"""Resolved configurations: no automatic values; stored keys and their order are those of the input."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdynat.config import EngineConfig, to_flat
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, Madry, MadryOptions
from fastdynat.methods.configs import default_config
from fastdynat.training.permitted_changes import stored_epochs
from fastdynat.training.resolve import resolve
from fastdynat.training.resolve_engine import check_switches
from fastdynat.training.resolved_config import (
    ResolvedAttack,
    ResolvedConfig,
    ResolvedData,
    ResolvedEngine,
    ResolvedOptim,
)
from fastdynat.training.resume import _place

NARROWED = {
    "data": ResolvedData,
    "attack": ResolvedAttack,
    "optim": ResolvedOptim,
    "engine": ResolvedEngine,
}


def resolved(method: str) -> ResolvedConfig[Any]:
    info = dataset_info("digits")
    assert info is not None
    config = default_config(method)
    return resolve(replace(config, engine=replace(config.engine, device="cpu", winograd="off")), info)


@pytest.mark.parametrize("method", ["madry", "dynat", "natural"])
def test_no_narrowed_field_is_automatic(method: str) -> None:
    assert method in METHODS
    config = resolved(method)
    for name, kind in NARROWED.items():
        group = getattr(config, name)
        assert type(group) is kind
        for key in kind.__annotations__:
            assert getattr(group, key) not in (None, "auto", "default"), key


@pytest.mark.parametrize(
    ("side", "model", "guide"),
    [
        (32, "wrn-28-10", "resnet18_s1122"),
        (64, "timm:vit_tiny_patch16_224", "resnet18_s1122"),
        (65, "torchvision:resnet18", "torchvision:resnet18"),
        (224, "timm:convnext_tiny", "timm:convnext_tiny"),
        (224, "object:Net", "resnet18_s1122"),
        (224, "small", "small"),
    ],
)
def test_the_usual_guide_suits_the_size_of_the_images(side: int, model: str, guide: str) -> None:
    info = dataset_info("cifar10")
    assert info is not None
    config = default_config("dynat")
    config = replace(config, model=replace(config.model, model=model))
    engine = replace(config.engine, device="cpu", winograd="off")
    found = resolve(replace(config, engine=engine), replace(info, image_shape=(3, side, side)))
    assert found.model.guide == guide


def test_the_stored_form_is_that_of_the_configuration_that_was_asked_for() -> None:
    asked = default_config("dynat")
    assert list(to_flat(resolved("dynat"))) == list(to_flat(asked))
    for name, kind in NARROWED.items():
        assert [f.name for f in fields(kind)] == [f.name for f in fields(getattr(asked, name))]


def test_a_resolved_configuration_resolves_to_itself() -> None:
    info = dataset_info("digits")
    assert info is not None
    once = resolved("dynat")
    assert resolve(once, info) == once


@pytest.mark.parametrize(
    ("epoch", "step", "text"),
    [
        (2, 0, "after epoch 2"),
        (1, 1, "at epoch 2, after 1 of 2 steps"),
        (1, 2, "at the end of epoch 2, before its validation"),
    ],
)
def test_the_place_where_training_continues(epoch: int, step: int, text: str) -> None:
    trainer: Any = SimpleNamespace(epoch=epoch, epoch_step=step, loader=SimpleNamespace(steps_per_epoch=2))
    assert _place(trainer) == text


def test_a_stored_configuration_that_lost_its_epochs_is_refused() -> None:
    config = default_config("madry")
    with pytest.raises(UserError, match=r"run/config.yaml has no epochs"):
        stored_epochs(Path("run"), config)
    assert stored_epochs(Path("run"), replace(config, optim=replace(config.optim, epochs=3))) == 3


def test_fused_convolutions_that_are_to_be_deterministic_are_refused() -> None:
    attack: Any = SimpleNamespace(attack_bn="eval", norm="linf")
    optim: Any = SimpleNamespace(opt="sgd", momentum=0.9, zero1=False)
    method, gpu = Madry(MadryOptions()), torch.device("cuda:0")
    for engine in (EngineConfig(fused_conv="on"), EngineConfig(deterministic=True)):
        check_switches(engine, attack, optim, method, gpu)
    with pytest.raises(UserError, match=r"--fused-conv on.*leave out --fused-conv or --deterministic"):
        check_switches(EngineConfig(fused_conv="on", deterministic=True), attack, optim, method, gpu)
