"""Optimiser, rate and schedule of a resolved configuration: usual numbers, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdynat.commands.main import main
from fastdynat.config.train_checks import check_optim
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.methods.configs import default_config
from fastdynat.training.resolve_optim import resolved_optim

USUAL = {
    "sgd": (0.1, 2e-4, None, None),
    "adam": (1e-3, 2e-4, (0.9, 0.999), 1e-8),
    "adamw": (1e-3, 0.05, (0.9, 0.999), 1e-8),
    "lion": (1e-4, 0.5, (0.9, 0.99), None),
}


def resolved(data: str = "cifar10", **optim: Any) -> Any:
    config, info = default_config("madry"), dataset_info(data)
    assert info is not None
    asked = replace(config.optim, **optim)
    check_optim(asked)
    return resolved_optim(replace(config, optim=asked), info)


@pytest.mark.parametrize("opt", USUAL)
def test_each_optimiser_has_its_usual_numbers(opt: str) -> None:
    found = resolved(opt=opt)
    assert (found.lr, found.weight_decay, found.opt_betas, found.opt_eps) == USUAL[opt]
    assert resolved("digits", opt=opt).lr == (0.03 if opt == "sgd" else found.lr)


def test_what_is_given_stays() -> None:
    found = resolved(opt="adamw", lr=0.02, weight_decay=0.0, opt_betas=(0.9, 0.95), opt_eps=1e-6)
    assert (found.lr, found.weight_decay, found.opt_betas, found.opt_eps) == (0.02, 0.0, (0.9, 0.95), 1e-6)
    assert resolved(schedule="cosine", warmup_epochs=5).warmup_lr == pytest.approx(0.001)
    assert resolved(schedule="cosine", warmup_epochs=5, warmup_lr=0.0).warmup_lr == 0
    assert resolved(schedule="cosine").warmup_lr is None


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"opt": "adamw", "nesterov": True}, "nesterov is for --opt sgd, not adamw"),
        ({"opt": "lion", "momentum": 0.8}, "momentum 0.8: lion has --opt-betas in its place"),
        (
            {"opt": "adam", "cycle_momentum": True, "schedule": "onecycle"},
            "cycle_momentum is for --opt sgd, not adam",
        ),
        (
            {"opt_betas": (0.9, 0.95)},
            "opt_betas: sgd has none; leave it out, or use --opt adam or adamw or lion",
        ),
        (
            {"opt": "lion", "opt_eps": 1e-8},
            "opt_eps: lion has none; leave it out, or use --opt adam or adamw",
        ),
        ({"opt": "adamw", "opt_betas": (0.9, 1.0)}, r"opt_betas must be two numbers in \[0, 1\)"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum above 0"),
        ({"warmup_epochs": 5}, "schedule release has no linear warm-up"),
        ({"schedule": "onecycle", "warmup_epochs": 5}, "or --warmup, the share of its rise"),
        ({"schedule": "cosine", "warmup_lr": 1e-5}, "there is no warm-up"),
        ({"schedule": "cosine", "warmup_prefix": True}, "there is no warm-up"),
        ({"schedule": "multistep", "min_lr": 1e-5}, "min_lr 1e-05 is for --schedule cosine"),
        ({"schedule": "cosine", "min_lr": 0.2}, r"min_lr must be at most lr \(0.1\), got 0.2"),
        ({"schedule": "cosine", "warmup_epochs": 5, "warmup_lr": 0.2}, r"warmup_lr must be at most lr"),
        (
            {"schedule": "cosine", "warmup_epochs": 10, "epochs": 10},
            "warmup_epochs must be below the 10 epochs of the schedule, got 10",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        resolved(**optim)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("form", "remedy"), [("flag", "did you mean adamw?"), ("file", "did you mean 'adamw'")]
)
def test_an_unknown_optimiser_is_answered_with_the_nearest_names(
    form: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("opt: adamww\n")
    given = ["--opt", "adamww"] if form == "flag" else ["--config", str(tmp_path / "run.yaml")]
    assert main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert remedy in said
    assert len(said.strip().splitlines()) == 1
