"""A network and data of the user on the command line: `--model my.py:make_net --data my.py:make_data`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.own import FILE

import fastdynat
from fastdynat import user_code
from fastdynat.commands.main import main
from fastdynat.data import own_data
from fastdynat.errors import UserError

QUICK = ["--method", "madry", "--steps", "1", "--eps", "0.02", "--batch-size", "64", "--quiet"]
OWN = ["--model", "own.py:make_net", "--data", "own.py:make_data"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the user's file in it and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(user_code, "_remembered", set())
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("own.py").write_text(FILE)
    return work


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_resume_eval_and_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *QUICK, *OWN, "--epochs", "2"]
    assert main([*command, "--run-dir", "whole"]) == 0
    assert main([*command, "--run-dir", "run", "--stop-after", "1"]) == 0
    assert "--model own.py" not in (folder / "run" / "config.yaml").read_text()

    monkeypatch.chdir(folder.parent)  # the run names the file by its whole path
    assert main(["train", "--resume", "work/run"]) == 0
    weights = [load_file(f"work/{name}/last/model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert set(weights[0]) == {"2.weight", "2.bias", "4.weight", "4.bias"}  # nothing is put in front

    assert main(["eval", "work/run", "--attacks", "clean", "--json", "found.json"]) == 0
    record = json.loads(Path("found.json").read_text())["results"][0]
    assert (record["architecture"], record["data"], record["images"]) == (
        "own.py:make_net",
        "own.py:make_data",
        100,
    )
    network, sidecar = fastdynat.load_network("work/run")
    assert sidecar.num_classes == 10
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert main(["export", "work/run", "--format", "torch", "--out", "net.pt2"]) == 0
    assert "source this cannot write" in refusal(["export", "work/run", "--out", "net.pt"], capsys)

    moved = folder.parent / "moved.py"
    shutil.copy(folder / "own.py", moved)
    again = ["train", "--resume", "work/run", "--epochs", "3", "--model", "moved.py:make_net"]
    assert main([*again, "--data", "moved.py:make_data"]) == 0

    monkeypatch.chdir(folder)
    shutil.rmtree("run")
    shutil.move("whole", "run")
    Path("own.py").write_text(FILE.replace("32", "16"))
    again = ["train", "--resume", "run", "--epochs", "3"]
    for changed in (again, [*again, *OWN], ["eval", "run"]):
        assert "own.py" in (line := refusal(changed, capsys))
        assert "the file has changed since the run began" in line
    Path("own.py").unlink()
    assert "bring the file back" in refusal(["eval", "run"], capsys)


def test_a_run_from_elsewhere_does_not_execute_its_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *QUICK, *OWN, "--epochs", "1", "--run-dir", "run"]) == 0
    monkeypatch.setattr(user_code, "_remembered", set())
    shutil.rmtree(folder.parent / "cache" / "fastdynat" / "user_code")
    for command in (["eval", "run"], ["train", "--resume", "run", "--epochs", "2"]):
        assert "was never trained with on this account" in refusal(command, capsys)
    # Naming the file again means that the user has read it.
    assert main(["train", "--resume", "run", "--epochs", "2", *OWN]) == 0
    assert main(["eval", "run", "--attacks", "clean", "--cache", "off"]) == 0


@pytest.mark.parametrize(("key", "file"), [("model", "config.yaml"), ("data", "config.yaml")])
def test_code_without_a_digest_in_a_run_is_refused(
    key: str, file: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["train", *QUICK, "--epochs", "1", "--run-dir", "run", "--train-size", "100", "--model", "small"]
        )
        == 0
    )
    path = folder / "run" / file
    Path("evil.py").write_text("raise SystemExit('executed')")
    lines = [
        f"{key}: {folder}/evil.py:x" if line.startswith(f"{key}:") else line
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(lines))
    assert "names code without its digest" in refusal(["train", "--resume", "run"], capsys)
    if key == "data":
        assert "names code without its digest" in refusal(["eval", "run"], capsys)


def test_a_sidecar_that_names_code_is_refused(folder: Path) -> None:
    assert (
        main(
            ["train", *QUICK, "--epochs", "1", "--run-dir", "run", "--train-size", "100", "--model", "small"]
        )
        == 0
    )
    sidecar = folder / "run" / "best" / "model.json"
    about = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**about, "architecture": "os:getcwd"}))
    with pytest.raises(UserError, match="names code without its digest"):
        fastdynat.load_network(folder / "run" / "best" / "model.safetensors")


REFUSED = {
    "module": (["--model", "own:make_net"], "name its file: path/to/file.py:make_net"),
    "no file": (["--model", "none.py:make_net"], "cannot read none.py (No such file or directory)"),
    "no callable": (["--model", "own.py:make_nut"], "own.py has no 'make_nut'"),
    "data as network": (["--model", "own.py:make_data"], "makes a dict, not a torch.nn.Module"),
    "network as data": (["--data", "own.py:make_one"], "own.py:make_one is a Sequential, not data"),
    "normalize": ([*OWN, "--normalize", "dataset"], "own.py:make_net takes images in [0, 1] as they are"),
    "data folder": (
        [*OWN, "--data-dir", "x"],
        "--data-dir has no effect: --data own.py:make_data brings its images",
    ),
    "object": (["--data", "object:data"], "object:data is data that was given to fastdynat.train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = REFUSED[case]
    with Path("own.py").open("a") as file:
        file.write("\n\ndef make_one():\n    return make_net(10)\n")
    assert message in refusal(["train", *QUICK, *flags, "--run-dir", "run"], capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize("tested", [False, True])
def test_data_without_test_images_are_said_before_training(
    tested: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run keeps to the content of its file: test images cannot be added later."""
    part = "(torch.arange(3 * 8 * 8 * 60, dtype=torch.uint8).view(60, 3, 8, 8), torch.arange(60) % 3)"
    parts = f"({part}, {part})" if tested else part
    Path("data.py").write_text(f"import torch\ndef make_data():\n    return {parts}\n")
    flags = ["--method", "madry", "--steps", "1", "--eps", "0.02", "--batch-size", "20", "--epochs", "1"]
    assert main(["train", *flags, "--model", "small", "--data", "data.py:make_data", "--run-dir", "run"]) == 0
    out = capsys.readouterr()
    assert ("data.py:make_data has no test images" in out.out + out.err) == (not tested)


def test_a_random_split_is_not_evaluated_on_its_training_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code is called again by an evaluation, and an unseeded permutation then gives other images."""
    file = (
        "import numpy as np\n"
        "from support.own import own_tensors\n\n\n"
        "def make_data():\n"
        "    images, labels = own_tensors()\n"
        "    order = np.random.permutation(640){}\n"
        "    train, test = order[:500], order[500:]\n"
        '    return {{"train": (images[train], labels[train]), "test": (images[test], labels[test])}}\n'
    )
    beside = {"PYTHONPATH": os.pathsep.join(sys.path)}
    evaluate = [sys.executable, "-m", "fastdynat", "eval"]
    network = ["--model", "own.py:make_net", "--epochs", "1"]
    for name, change in (("shuffled", ""), ("fixed", ".tolist(); order.sort()")):
        Path(f"{name}.py").write_text(file.format(change))
        code = f"{name}.py:make_data"
        assert main(["train", *QUICK, *network, "--data", code, "--run-dir", name]) == 0
        own_data._called.clear()
        np.random.seed(1)  # this process, too, makes other data now: training has restored numpy's state
        flags = ["--attacks", "clean", "--cache", "off"]
        if name == "fixed":
            assert main(["eval", "fixed", *flags]) == 0
            assert main(["eval", "shuffled", *flags, "--data", code]) == 0  # other data on purpose
            continue
        other = subprocess.run(
            [*evaluate, "shuffled", *flags], env={**os.environ, **beside}, capture_output=True, text=True
        )
        assert other.returncode == 2
        told = "shuffled.py:make_data makes other test images than when shuffled was trained"
        assert told in other.stderr.strip().splitlines()[-1]
        assert told in refusal(["eval", "shuffled", *flags, "--data", code], capsys)
        weights = "shuffled/best/model.safetensors"
        assert "makes other test images" in refusal(["eval", weights, *flags, "--data", code], capsys)
        with pytest.raises(UserError, match="makes other test images than when shuffled was trained"):
            fastdynat.evaluate("shuffled", code, "clean")
        assert "makes other test images" in refusal(["report", "shuffled", "--out", "report.html"], capsys)


def test_a_resumed_run_keeps_its_test_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later checkpoint would otherwise name the images that the code makes by then."""
    Path("data.py").write_text(
        "from pathlib import Path\n"
        "from support.own import own_tensors\n\n\n"
        "def make_data():\n"
        "    images, labels = own_tensors()\n"
        "    test = images[500:] + int(Path('level').read_text())\n"
        "    return (images[:500], labels[:500]), (test, labels[500:])\n"
    )
    Path("level").write_text("0")
    flags = ["--model", "own.py:make_net", "--data", "data.py:make_data", "--epochs", "2", "--run-dir", "run"]
    assert main(["train", *QUICK, *flags, "--stop-after", "1"]) == 0
    Path("level").write_text("1")
    own_data._called.clear()  # as in another process
    line = refusal(["train", "--resume", "run"], capsys)
    assert "data.py:make_data makes other test images than when run was trained" in line
    assert "or decodes differently on this machine" in line
    assert "give arrays to fastdynat.evaluate" in line
    Path("level").write_text("0")
    own_data._called.clear()
    assert main(["train", "--resume", "run"]) == 0
    assert main(["eval", "run", "--attacks", "clean", "--cache", "off"]) == 0
