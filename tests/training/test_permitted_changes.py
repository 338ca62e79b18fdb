"""`--resume --epochs N` is permitted only if the epochs so far would have been the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_variants import TINY

import fastdynat.methods
from fastdynat.commands.main import main
from fastdynat.config import override
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.methods import Madry, method_class
from fastdynat.methods.configs import default_config
from fastdynat.training import permitted_changes
from fastdynat.training.permitted_changes import check_epochs
from fastdynat.training.resolve import resolve

# Files of methods that read the number of epochs, and what makes epoch 2 of 2 differ from epoch 2 of 4.
READERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "nu_at.py": [("nu_at", {})],
    "liet.py": [("liet", {})],
    "iad.py": [("iad", {"begin": 0.5})],
    "gairat.py": [("gairat", {"weight_from": 0.5})],
    "mail.py": [("mail", {"weight_from": 0.5})],
    "dynat.py": [("dynat", {"weighting": "mail", "weight_from": 0.5})],
}
STEADY: list[tuple[str, dict[str, Any]]] = [
    ("madry", {"prior_epochs": 1}),
    ("fgsm_pgi", {"reset_epochs": 1}),
    ("ikl", {}),
    ("free", {}),
    ("nu_at", {"nuc_max": 0.0}),
    ("iad", {"begin": 1.0}),
]


def check(method: str, options: dict[str, Any], before: int, now: int, burn_in: int = 0) -> None:
    """Ask to continue a run of `before` epochs up to epoch `now`."""
    info = dataset_info("digits")
    assert info is not None
    values = {"schedule": "constant", "epochs": now, "burn_in": burn_in, "device": "cpu", "winograd": "off"}
    config = resolve(override(default_config("madry"), values, "test"), info, announce=False)
    asked = replace(config, method=method, options=method_class(method).options_type(**options))
    check_epochs(asked, before, 3, info)


def test_every_method_that_reads_the_number_of_epochs_is_tested_here() -> None:
    folder = Path(fastdynat.methods.__file__).parent
    texts = {path.name: path.read_text() for path in folder.glob("*.py") if path.name != "base.py"}
    readers = {name for name, text in texts.items() if ".epochs" in text or "def begins(" in text}
    assert readers == set(READERS)


@pytest.mark.parametrize(("method", "options"), [case for cases in READERS.values() for case in cases])
@pytest.mark.parametrize(("before", "now"), [(2, 4), (4, 2)])
def test_a_loss_that_depends_on_the_number_of_epochs(
    method: str, options: dict[str, Any], before: int, now: int
) -> None:
    with pytest.raises(UserError, match=rf"method {method} .*\({before} in this run, {now} asked\)"):
        check(method, options, before, now)


@pytest.mark.parametrize(("method", "options"), STEADY)
def test_a_loss_that_does_not(method: str, options: dict[str, Any]) -> None:
    check(method, options, 2, 4)


def test_a_ramp_that_has_not_begun() -> None:
    check("nu_at", {}, 1, 4)  # 0 of 1 epochs are completed, and 0 of 4
    check("nu_at", {}, 2, 4, burn_in=1)
    with pytest.raises(UserError, match="keep --epochs"):
        check("liet", {}, 2, 4, burn_in=1)  # 1 of 1, and 1 of 3


class Drawn(Madry):
    """Draws a buffer anew in each epoch; what no image has written yet is NaN."""

    def make_buffers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"noise": x.new_zeros(3), "last": x.new_full((self.num_images,), torch.nan)}

    def begin_epoch(self) -> None:
        self.buffers["noise"].normal_()


class Grown(Drawn):
    """Adds a share of the run to a buffer in each epoch."""

    def begin_epoch(self) -> None:
        self.buffers["noise"].add_(1 / self.epochs)


def test_buffers_of_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found: type[Madry] = Drawn
    monkeypatch.setattr(permitted_changes, "method_class", lambda _: found)
    state = torch.get_rng_state()
    check("madry", {}, 2, 4)
    assert torch.equal(torch.get_rng_state(), state)
    found = Grown
    with pytest.raises(UserError, match="keep --epochs"):
        check("madry", {}, 2, 4)


@pytest.mark.parametrize("method", ["nu_at", "liet"])
def test_the_command_refuses(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    flags = [*TINY, "--method", method, "--schedule", "constant", "--val-every", "9"]
    assert main(["train", "--run-dir", run, *flags]) == 0
    assert main(["train", "--resume", run, "--epochs", "4"]) == 2
    assert f"the loss of method {method} changes over the run" in capsys.readouterr().err
