"""Methods of users' files on the command line: flags, training, resuming, comparing, refusals."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, method_class, method_label, method_name, options_type, user_methods
from fastdynat.methods.configs import stored_config

SQUEEZE = '''
"""Logit squeezing."""

from dataclasses import dataclass

import torch.nn.functional as F

from fastdynat.attacks import AttackGoal, wide
from fastdynat.methods import AttackDefaults, Inner, Method, Outer


@dataclass(frozen=True, kw_only=True)
class SqueezeOptions:
    """Options of logit squeezing."""

    squeeze_weight: float = 0.05
    """Weight of the squared logits."""


class Squeeze(Method[SqueezeOptions]):
    """CE(f(x'), y) + weight mean z(x')^2."""

    options_type, attack_defaults = SqueezeOptions, AttackDefaults(start="uniform", steps=10)

    def inner(self, nets, batch):
        return Inner(AttackGoal("ce", batch.labels))

    def outer(self, nets, batch, inner, attacked):
        logits = wide(nets.model(attacked.x_adv))
        loss = F.cross_entropy(logits, batch.labels) + self.options.squeeze_weight * logits.square().mean()
        return Outer({"model": loss}, {"loss": loss.detach()})
'''
TINY = ["--train-size", "60", "--val-size", "20", "--batch-size", "20", "--steps", "1", "--epochs", "2"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a method, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_method.py"
    path.write_text(SQUEEZE)
    return path


def train(*words: str) -> int:
    return main(["train", *words, *TINY, "--quiet"])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def assert_same(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which the command refuses, before it writes or trains anything."""
    capsys.readouterr()
    assert main([*words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fastdynat: error: ")
    return lines[0].removeprefix("fastdynat: error: ")


def test_options_are_flags_with_their_help(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "bench"):
        with pytest.raises(SystemExit) as end:
            main([command, "--method", "my_method.py:Squeeze", "--help"])
        assert end.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "--squeeze-weight FLOAT" in shown
        assert "Weight of the squared logits. (default: 0.05)" in shown
    said = refusal(capsys, "train", "--method", "my_method.py:Squeeze", "--squeeze-wait", "1")
    assert said.startswith("unknown flag --squeeze-wait: did you mean --squeeze-weight")
    said = refusal(capsys, "train", "--method", "my_method.py:Squeeze", "--squeeze-weight", "x")
    assert said == "--squeeze-weight must be a number, got 'x'"


def test_one_class_with_one_name(file: Path) -> None:
    name = method_name("my_method.py:Squeeze")
    assert re.fullmatch(rf"{re.escape(str(file))}:Squeeze#sha256=[0-9a-f]{{16}}", name)
    assert method_name(name) == name
    assert method_name(str(file) + ":Squeeze") == name
    assert method_class(name) is method_class("my_method.py:Squeeze")
    assert options_type(name) is method_class(name).options_type
    assert method_label(name) == "squeeze"
    assert name not in METHODS


def test_a_run_stores_file_class_and_digest_and_resumes_exactly(file: Path) -> None:
    flags = ("--method", "my_method.py:Squeeze", "--squeeze-weight", "0.1")
    assert train(*flags, "--run-dir", "whole") == 0
    assert train(*flags, "--run-dir", "halves", "--stop-after", "1") == 0
    stored = yaml.safe_load(Path("halves/config.yaml").read_text())
    assert stored["method"] == method_name("my_method.py:Squeeze")
    assert stored["squeeze_weight"] == 0.1
    assert json.loads(Path("halves/last/model.json").read_text())["method"] == "squeeze"
    assert main(["train", "--resume", "halves", "--quiet"]) == 0
    assert_same(Path("whole"), Path("halves"))


def test_without_its_term_it_is_madrys(file: Path) -> None:
    assert train("--method", "my_method.py:Squeeze", "--squeeze-weight", "0", "--run-dir", "squeeze") == 0
    assert train("--method", "madry", "--run-dir", "madry") == 0
    left, right = weights(Path("squeeze")), weights(Path("madry"))
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-5, msg=key)


def test_a_new_process_resumes_and_a_config_file_names_the_method(file: Path) -> None:
    Path("config.yaml").write_text("method: my_method.py:Squeeze\nsqueeze_weight: 0.2\n")
    assert train("--config", "config.yaml", "--run-dir", "run", "--stop-after", "1") == 0
    assert stored_config(Path("run")).options.squeeze_weight == 0.2
    command = [sys.executable, "-m", "fastdynat", "train", "--resume", "run", "--quiet"]
    subprocess.run(command, check=True)
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2


def test_resume_without_the_file_with_another_and_from_a_new_place(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--method", "my_method.py:Squeeze", "--run-dir", "run", "--stop-after", "1") == 0
    before = Path("run/config.yaml").read_text()
    monkeypatch.setattr(user_methods, "_loaded", {})  # as in a new process

    file.write_text(SQUEEZE.replace("square()", "abs()"))
    assert refusal(capsys, "train", "--resume", "run") == (
        f"{file}:Squeeze: the file has changed since the run began with it; "
        "bring its old content back, or start a new run"
    )
    said = refusal(capsys, "train", "--resume", "run", "--method", "my_method.py:Squeeze")
    assert said == (
        "run trains by my_method.py:Squeeze, not by my_method.py:Squeeze with another content; "
        "start a new run for that"
    )
    assert "not by trades; start a new run" in refusal(
        capsys, "train", "--resume", "run", "--method", "trades"
    )

    file.unlink()
    said = refusal(capsys, "train", "--resume", "run")
    assert said == f"{file}:Squeeze: cannot read {file} (No such file or directory); bring the file back"
    # Where only the network is needed, the file is not.
    assert main(["eval", "run", "--attacks", "clean", "--num-images", "20"]) == 0
    assert "squeeze" in capsys.readouterr().out
    assert Path("run/config.yaml").read_text() == before

    Path("moved").mkdir()
    Path("moved/renamed.py").write_text(SQUEEZE)
    assert main(["train", "--resume", "run", "--method", "moved/renamed.py:Squeeze", "--quiet"]) == 0
    assert stored_config(Path("run")).method == method_name("moved/renamed.py:Squeeze")
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2


def test_compare_takes_it_beside_built_in_ones(file: Path) -> None:
    words = ["compare", "--methods", "natural,my_method.py:Squeeze", "--set", "squeeze.squeeze_weight=0.3"]
    more = ["--attacks", "clean", "--out", "compared", "--json", "c.json"]
    assert main([*words, *more, *TINY]) == 0
    assert {path.name for path in Path("compared").iterdir() if path.is_dir()} >= {
        "natural-seed1",
        "squeeze-seed1",
    }
    assert stored_config(Path("compared/squeeze-seed1")).options.squeeze_weight == 0.3
    assert {row["method"] for row in json.loads(Path("c.json").read_text())["runs"]} == {"natural", "squeeze"}


OPTIONS = "from dataclasses import dataclass\nfrom fastdynat.methods import Method, register_method\n"
FROZEN = "@dataclass(frozen=True)\nclass Options:\n    {field}\n"
CLASS = """class Mine(Method[Options]):
    options_type = Options
    {name}
    inner = outer = lambda *_: None
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "cannot read mine.py (No such file or directory)"),
        ("X = 1", "mine.py has no 'Mine'"),
        ("Mine = 3", "3 is not a subclass of fastdynat.methods.Method"),
        ("class Mine: pass", "Mine is not a subclass of fastdynat.methods.Method"),
        ("1 / 0", "mine.py failed: ZeroDivisionError: division by zero"),
        ("def f(:", "mine.py failed: SyntaxError: invalid syntax"),
        (
            OPTIONS + "class Mine(Method): pass",
            "Mine does not define inner and outer, which every method has",
        ),
        (
            OPTIONS + FROZEN.format(field="x: int = 1").replace("frozen", "order") + CLASS.format(name=""),
            "Mine.options_type must be a frozen dataclass, got Options: decorate it with @dataclass",
        ),
        (
            OPTIONS + FROZEN.format(field="x: int") + CLASS.format(name=""),
            "every option needs a default",
        ),
        (
            OPTIONS + FROZEN.format(field="lr: float = 0.1") + CLASS.format(name=""),
            "Options.lr has the name of a training flag; rename the option",
        ),
        (
            OPTIONS + FROZEN.format(field="recipe: int = 1") + CLASS.format(name=""),
            "--recipe would be two flags of this command: rename the method's option",
        ),
        (
            OPTIONS + FROZEN.format(field="x: int = 1") + CLASS.format(name="name = 'trades'"),
            "name 'trades' is taken by fastdynat.methods.trades; choose another",
        ),
        (
            OPTIONS + FROZEN.format(field="x: int = 1") + CLASS.format(name="name = '../x'"),
            "name '../x' must be one word",
        ),
        (
            OPTIONS
            + FROZEN.format(field="x: int = 1")
            + "@register_method('trades')\n"
            + CLASS.format(name=""),
            "choose another name",
        ),
    ],
)
def test_what_cannot_be_a_method_is_refused_in_one_line(
    source: str | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if source is not None:
        Path("mine.py").write_text(source)
    assert says in refusal(capsys, "train", "--method", "mine.py:Mine", "--run-dir", "run", *TINY)
    assert not Path("run").exists()


def test_two_files_of_one_name_are_two_methods(file: Path) -> None:
    Path("other").mkdir()
    Path("other/my_method.py").write_text(SQUEEZE.replace("squeeze_weight", "other_weight"))
    first, second = method_class("my_method.py:Squeeze"), method_class("other/my_method.py:Squeeze")
    assert first.options_type().squeeze_weight == second.options_type().other_weight == 0.05
    with pytest.raises(SystemExit):
        main(["train", "--method", "my_method.py:Squeeze", "--help"])


def test_a_registered_class_of_a_file_is_one_method(file: Path) -> None:
    source = SQUEEZE.replace("class Squeeze(", "@register_method('logit_squeezing')\nclass Squeeze(")
    file.write_text(source.replace("import AttackDefaults", "import register_method, AttackDefaults"))
    try:
        assert method_label("my_method.py:Squeeze") == "logit_squeezing"
        assert METHODS["logit_squeezing"] is method_class("my_method.py:Squeeze")
    finally:
        METHODS.pop("logit_squeezing", None)


def test_another_accounts_run_does_not_execute_code(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(SQUEEZE.replace("Logit squeezing.", "Another account's."))
    shutil.copy(file, tmp_path / "copy.py")
    name = method_name("my_method.py:Squeeze")
    foreign = name.replace("my_method.py", "copy.py")
    with pytest.raises(UserError, match="never trained with on this account"):
        method_name(foreign)
    assert method_name("copy.py:Squeeze") == foreign
