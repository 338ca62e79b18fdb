"""The registry of attacks: entries without torch, names, refusals, and attacks of users' files."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from torch import nn

from fastdynat import attacks
from fastdynat.attacks import NamedAttack, Radii, RestartedPGD, parse_attack, register, registry
from fastdynat.attacks.registry import entries, find, listed, read_entries, split_names
from fastdynat.attacks.user_attacks import UserAttack
from fastdynat.data import ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation import measure, transfer_matrix

EPS = 8 / 255
HOW: dict[str, Any] = {"device": torch.device("cpu"), "batch_size": 8, "seed": 0}
FOLDER = Path(attacks.__file__).parent

NOISE = """
from dataclasses import dataclass
import torch
from fastdynat.attacks import register

@register(
    r"noise(?P<draws>\\d+)?", {"noise": "uniform noise in the ball, the worst of 3 draws"}, norms=("linf",)
)
@dataclass(frozen=True)
class Noise:
    eps: float
    draws: int = 3
    norm: str = "linf"

    def __call__(self, ascent, x, labels, *, generator=None, tick=None):
        best = x
        for _ in range(self.draws):
            u = 2 * torch.rand(x.shape, generator=generator) - 1
            x_adv = (x + self.eps * u).clamp(0, 1)
            wrong = ascent.logits(x_adv).argmax(1) != labels
            best = torch.where(wrong[:, None, None, None], x_adv, best)
        return best

@dataclass(frozen=True)
class Grey:
    norm: str = "linf"

    def __call__(self, ascent, x, labels, *, generator=None, tick=None):
        return torch.full_like(x, 0.5)

class NoDataclass:
    norm = "linf"

@dataclass(frozen=True)
class NoCall:
    norm: str = "linf"

@dataclass(frozen=True)
class NoNorm:
    def __call__(self, ascent, x, labels, *, generator=None, tick=None):
        return x

number = 3
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a test's registrations afterwards; modules of the package register only once."""
    for entry in entries():
        importlib.import_module(entry.module)
    for name in ("_registered", "_constructors"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_attack.py"
    path.write_text(NOISE)
    return path


@pytest.fixture(scope="module")
def images() -> tuple[nn.Module, ImageSet]:
    torch.manual_seed(0)
    model = tiny_cnn().eval()
    x = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        return model, ImageSet(x, model(x / 255).argmax(1))


# ---- built-in entries


def test_entries_read_from_sources_are_those_that_the_modules_register() -> None:
    read = {entry.pattern: entry for file in FOLDER.glob("*.py") for entry in read_entries(file)}
    for name in listed():
        if name != registry.CLEAN:
            parse_attack(name, eps=EPS, step_size=EPS / 4)  # imports the module
    own = {e.pattern: e for e in registry._registered.values() if e.module.startswith("fastdynat.attacks.")}
    assert read == own
    assert len(read) > 10


def test_a_name_is_of_one_attack() -> None:
    for name in listed():
        assert name == registry.CLEAN or sum(e.match(name) is not None for e in entries()) == 1, name


def test_names_are_known_without_torch() -> None:
    code = """
import sys
from fastdynat.attacks.registry import find, listed
assert "pgd20" in listed() and find("square500")[0].module == "fastdynat.attacks.square"
assert "torch" not in sys.modules
from fastdynat.attacks import AttackGoal, PGDSpec, pgd, wide, AttackResult
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    assert all(getattr(attacks, name) is not None for name in attacks.__all__)
    assert set(attacks.__all__) <= set(dir(attacks))


def test_a_new_file_in_the_folder_is_an_attack(tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text(NOISE)
    (entry,) = read_entries(tmp_path / "noise.py")
    assert (entry.module, entry.constructor) == ("fastdynat.attacks.noise", "Noise")
    assert (entry.norms, dict(entry.help)) == (
        ("linf",),
        {"noise": "uniform noise in the ball, the worst of 3 draws"},
    )


# ---- register


def test_a_registered_function_or_class_is_found_by_name() -> None:
    @register(r"twice(?P<steps>\d+)", {"twice5": "PGD with double steps"}, norms=("linf", "l2"))
    def twice(match: Any, radii: Radii) -> RestartedPGD:
        return parse_attack(f"pgd{2 * int(match['steps'])}", eps=radii.eps, step_size=radii.step_size).search  # type: ignore[return-value]

    assert parse_attack("TWICE3", eps=EPS, step_size=EPS) == NamedAttack(
        "twice3", parse_attack("pgd6", eps=EPS, step_size=EPS).search
    )
    assert listed()["twice5"] == "PGD with double steps"
    with pytest.raises(
        UserError, match="attack 'twice3': no l1 form of it is known, only linf and l2; use pgd3"
    ):
        parse_attack("twice3", eps=EPS, step_size=EPS, norm="l1")
    with pytest.raises(UserError, match="did you mean 'twice5'"):
        find("twise5")


@pytest.mark.parametrize(
    ("pattern", "help", "message"),
    [
        ("pgd20", "mine", "the attack name 'pgd20' is taken by fastdynat.attacks.restarted_pgd.pgd_attack"),
        (r"\w+", {"new": "everything"}, "is taken by"),
        ("Noise", "mine", "must be in lower case"),
        (r"noise\d", {"noise": "mine"}, "must be in lower case and match"),
        ("noise", {}, "lists no name"),
    ],
)
def test_names_that_cannot_be_registered(pattern: str, help: Any, message: str) -> None:
    before = listed()
    with pytest.raises(UserError, match=message):
        register(pattern, help)(lambda match, radii: None)
    assert listed() == before


def test_lists_of_names() -> None:
    assert split_names(" PGD20, /Tmp/My.py:Noise,clean ") == ["pgd20", "/Tmp/My.py:Noise", "clean"]
    with pytest.raises(UserError, match="named twice"):
        split_names("pgd20,PGD20")
    with pytest.raises(UserError, match="no attack named in ' , '"):
        split_names(" , ")


# ---- attacks of users' files


def test_an_attack_of_a_file(file: Path, images: tuple[nn.Module, ImageSet]) -> None:
    model, data = images
    named = parse_attack(f"{file}:Noise", eps=0.25, step_size=0.1)
    assert named.name == "my_attack.py:Noise"
    assert not named.half_precision
    assert isinstance(named.search, UserAttack)
    three, zero = measure(model, data, named, **HOW), parse_attack(f"{file}:noise0", eps=0.25, step_size=0.1)
    assert 0 < three.accuracy < 1
    assert measure(model, data, zero, **HOW).accuracy == 1
    assert measure(model, data, named, **HOW).robust_bits == three.robust_bits


NEAREST = """
from dataclasses import dataclass

import torch

from fastdynat.attacks.interface import Nearest


@dataclass(frozen=True)
class Grey:
    norm: str = "linf"

    def __call__(self, ascent, x, labels, *, generator=None, tick=None):
        x_adv = torch.full_like(x, 0.5)
        distance = torch.linalg.vector_norm((x_adv - x).flatten(1), ord=float("inf"), dim=1)
        found = torch.ones(len(x), dtype=torch.bool)
        return Nearest(x_adv, torch.tensor(0), 0, found=found, distance=distance)
"""


def test_a_nearest_image_of_a_file_counts_in_the_ball_only(
    tmp_path: Path, images: tuple[nn.Module, ImageSet]
) -> None:
    (path := tmp_path / "near.py").write_text(NEAREST)
    model, data = images
    found = {
        eps: measure(model, data, parse_attack(f"{path}:Grey", eps=eps, step_size=0.1), **HOW)
        for eps in (0.1, 0.6)
    }
    assert found[0.1].accuracy == 1  # every adversarial image is farther away
    assert found[0.6].accuracy < 1
    assert found[0.1].distances == found[0.6].distances


def test_the_numbers_of_a_file_decide_its_key(file: Path) -> None:
    def search() -> Any:
        return parse_attack(f"{file}:Grey", eps=EPS, step_size=EPS).search

    before = search()
    assert search().source == before.source
    file.write_text(NOISE.replace("0.5", "0.25"))
    assert search().source != before.source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Absent", "my_attack.py has no 'Absent'"),
        ("NoDataclass", "NoDataclass is not a dataclass"),
        ("number", "number is no attack: int is not a dataclass"),
        ("NoCall", r"needs __call__\(self, ascent, x, labels"),
        ("NoNorm", "needs a field or property `norm`, one of linf, l2"),
    ],
)
def test_what_is_no_attack_is_refused(file: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_attack(f"{file}:{name}", eps=EPS, step_size=EPS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "importing .*my_attack.py failed: FileNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero .*my_attack.py:1"),
        (
            NOISE.replace('r"noise(?P<draws>\\d+)?", {"noise"', '"pgd20", {"pgd20"'),
            r"failed: the attack name 'pgd20' is taken.* \(.*my_attack\.py:\d+\)",  # no line of this package
        ),
    ],
)
def test_files_that_cannot_be_loaded(file: Path, text: str | None, message: str) -> None:
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_attack(f"{file}:Noise", eps=EPS, step_size=EPS)


def test_a_built_in_attack_may_return_images(images: tuple[nn.Module, ImageSet]) -> None:
    named = NamedAttack("grey", lambda ascent, x, labels, **_: x.clone())  # type: ignore[arg-type,return-value]
    assert measure(*images, named, **HOW).accuracy == 1  # the labels are the predictions
    assert transfer_matrix({"one": images[0]}, images[1], named, **HOW).names == ["one"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return torch.full_like(x, 0.5)", "outside the ball of eps 0.03137; project them"),
        ("return x + 1", r"pixels outside \[0, 1\]"),
        ("return x * float('nan')", r"outside \[0, 1\] or NaN"),
        ("return x[:1]", r"returned torch.float32 \(1, 3, 8, 8\)"),
        ("return x.double()", "returned torch.float64"),
        ("return None", "returned NoneType"),
    ],
)
def test_a_wrong_result_is_refused(
    file: Path, images: tuple[nn.Module, ImageSet], body: str, message: str
) -> None:
    file.write_text(NOISE.replace("return torch.full_like(x, 0.5)", body))
    with pytest.raises(UserError, match=message):
        measure(*images, parse_attack(f"{file}:Grey", eps=EPS, step_size=EPS), **HOW)
