"""Bad input: one clear line on standard error, exit code 2, before training starts and with nothing lost."""

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdynat.commands.main import main
from fastdynat.data import ImageSet, TrainSplit
from fastdynat.errors import UserError
from fastdynat.runs import RunDir, load_network
from fastdynat.runs.manifest import write_manifest
from fastdynat.training import resolve_engine
from fastdynat.training.training_state import read_training_state

TINY = [
    "--train-size",
    "40",
    "--val-size",
    "20",
    "--batch-size",
    "20",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--quiet",
]
Run = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must be refused; returns its one line."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("fastdynat: error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0]
        return errors[0]

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that damage one work on a copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--stop-after", "1"]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


@pytest.mark.parametrize(
    "flags",
    [
        ["--graphs", "on"],
        ["--guide-stream", "on"],
        ["--fused-conv", "on"],
        ["--fold", "on", "--attack-bn", "train"],
        ["--boundary-speed", "5", "--norm", "l2"],
        ["--method", "natural", "--on-collapse", "stop"],
    ],
    ids=" ".join,
)
def test_combinations_are_refused_before_anything_is_measured(
    flags: list[str], refused: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Verifying operators and timing convolutions takes minutes on a busy machine at the first start."""

    def too_early(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured before the refusal")

    for name in ("check_kernels", "pick_amp", "pick_channels_last"):
        monkeypatch.setattr(resolve_engine, name, too_early)
    refused("train", "--device", "cpu", "--run-dir", tmp_path / "run", *TINY, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "cifar1O"], "unknown dataset 'cifar1O': did you mean 'cifar10'"),
        (["--model", "resnet81"], "unknown model 'resnet81': did you mean 'resnet18'"),
        (["--guide", "smal"], "unknown model 'smal': did you mean 'small'"),
        (["--method", "dynta"], "unknown method 'dynta': did you mean 'dynat'"),
        (["--eps", "0"], "eps must be above 0"),
        (["--eps=-8/255"], "eps must be above 0"),
        (["--eps", "256"], "eps must be at most 1"),
        (["--eps", "eight"], "eps must be a number or a fraction such as 8/255, got 'eight'"),
        (["--eps", "nan"], "eps must be a number"),
        (["--step-size", "0"], "step-size must be above 0"),
        (["--eval-eps=-1"], "eval-eps must be above 0"),
        (["--steps=-1"], "steps must be >= 0, got -1"),
        (["--early-steps", "11"], "early-steps must be between 0 and steps"),
        (["--early-share", "1.5"], r"early-share must be in \[0, 1\], got 1.5"),
        (["--graphs", "on", "--device", "cpu"], "--graphs on needs a CUDA device, got cpu"),
        (["--guide-stream", "on", "--device", "cpu"], "--guide-stream on needs a CUDA device, got cpu"),
        (["--fold", "on", "--attack-bn", "train"], "--fold on needs --attack-bn eval, got train"),
        (
            ["--kernels", "cuda", "--device", "cpu"],
            "--kernels cuda: backend 'cuda' cannot run: needs cuda tensors, got cpu; leave",
        ),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--burn-in", "2"], r"burn-in must be a number of epochs below --epochs \(2\), got 2"),
        (["--burn-in=-1"], "burn-in must be a number of epochs"),
        (
            ["--method", "vat", "--burn-in", "1", "--labelled", "20"],
            "burn-in 1: natural training needs every label",
        ),
        (["--lr=-1"], "lr must be above 0, got -1"),
        (["--lr", "nan"], "lr must be"),
        (["--ema", "1"], r"ema must be in \[0, 1\), got 1"),
        (["--ema", "0.9", "--ema-warmup", "1"], r"ema-warmup must be a share of the run in \[0, 1\), got 1"),
        (["--ema-warmup", "0.1"], "ema-warmup 0.1: there is no weight average; turn it on with --ema"),
        (["--ema-buffers", "copy"], "ema-buffers copy: there is no weight average"),
        (["--momentum", "0", "--nesterov"], "nesterov needs momentum"),
        (["--milestones", "0.5", "75"], "milestones must be shares"),
        (
            ["--warmup", "0.1"],
            "warmup 0.1: schedule release has none; leave it out, or use --schedule onecycle or triangular",
        ),
        (
            ["--warmup", "1", "--schedule", "triangular"],
            r"warmup must be a share of the run in \[0, 1\), got 1",
        ),
        (["--warmup", "nan", "--schedule", "onecycle"], "warmup must be a share"),
        (["--clip-grad=-1"], "clip-grad must be >= 0"),
        (["--batch-size", "0"], "batch-size must be >= 1"),
        (["--batch-size", "1000"], "1000"),
        (["--val-size", "100000"], "val-size"),
        (["--train-size", "3"], "3"),
        (["--device", "cuda:7"], "device 'cuda:7' cannot be used"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--beta", "0"], "beta must be above 0, got 0"),
        (["--temperature=-2"], "temperature must be above 0"),
        (["--stop-after", "0"], "stop-after must be >= 1"),
        (["--stop-at", "45"], r"stop-at must be a share in \(0, 1\], got 45; write 45 % as 0.45"),
        (["--stop-at", "0.4", "--val-size", "0"], "stop-at needs validation images"),
        (["--patience", "0"], "patience must be a number of validations >= 1, got 0"),
        (["--patience", "2", "--val-size", "0"], "patience needs validation images: leave --val-size 0 out"),
        (["--on-collapse", "stop", "--val-size", "0"], "on-collapse stop needs validation images"),
        (["--val-size", "inf"], "val-size must be"),
        (["--image-size", "100000"], "image-size must be between 1 and 4096"),
        (["--device", "meta"], "only cpu and cuda are supported"),
        (["--seed", "99999999999999999999"], "seed must be in"),
        (["--resume"], "--resume needs a value"),
        (["--save-every", "0"], "save-every must be above 0"),
        (["--seed=-1"], "seed must be in"),
        (["--model", "torchvision:resnet18"], "torchvision"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "nowhere"),
        (["--data", "mnist", "--data-dir", "nowhere", "--no-download"], "--data-dir"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Run, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused("train", "--run-dir", "run", *TINY, *flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch': did you mean 'epochs'"),
        ("epochs: three", "epochs must be int or nothing, got 'three'"),
        ("eps: [1]", "eps must be float or str"),
        ("amp: bf32", "unknown amp 'bf32': did you mean 'bf16'"),
        ("nesterov: 1", "nesterov must be bool, got 1"),
        ("milestones: 0.5", "milestones must be a list of numbers"),
        ("- epochs", "must hold `key: value` lines, got a list"),
        ("epochs: [3", "is not valid YAML"),
        ("method: 7", "method must be a name, got 7"),
    ],
)
def test_config_files(tmp_path: Path, refused: Run, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    line = refused("train", "--config", file, "--run-dir", tmp_path / "run")
    assert re.search(message, line)
    assert "config.yaml" in line
    assert not (tmp_path / "run").exists()


def test_unknown_command_and_flag(refused: Run) -> None:
    assert "did you mean 'train'" in refused("trian")
    assert "unknown flag --epoch-s: did you mean --epochs" in refused("train", "--epoch-s", "3")


def test_an_existing_run_is_kept(run: Path, refused: Run) -> None:
    before = (run / "last" / "model.safetensors").read_bytes()
    line = refused("train", "--run-dir", run, *TINY)
    assert f"--resume {run}" in line
    assert "--overwrite" in line
    # An overwrite that fails its checks has removed nothing either.
    refused("train", "--run-dir", run, *TINY, "--overwrite", "--model", "resnet81")
    assert (run / "last" / "model.safetensors").read_bytes() == before
    assert main(["train", "--run-dir", str(run), *TINY, "--overwrite"]) == 0
    assert (run / "last" / "model.safetensors").read_bytes() != before


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path: Path, refused: Run) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds no run" in refused("train", "--run-dir", tmp_path, *TINY, "--overwrite")
    assert (tmp_path / "thesis.tex").exists()


def test_other_tools_configurations_and_files_are_never_removed(
    run: Path, tmp_path: Path, refused: Run
) -> None:
    project = tmp_path / "project"
    (project / "checkpoints").mkdir(parents=True)
    (project / "config.yaml").write_text("a: 1\n")
    assert "holds no run" in refused("train", "--run-dir", project, *TINY, "--overwrite")
    (project / "config.yaml").unlink()
    assert "holds no run" in refused("train", "--run-dir", project, *TINY)
    # In a run's folder, --overwrite removes what the run wrote and leaves the user's notes.
    (run / "notes.txt").write_text("precious")
    assert main(["train", "--run-dir", str(run), *TINY, "--overwrite", "--epochs", "1"]) == 0
    assert (run / "notes.txt").read_text() == "precious"


def test_resume_takes_no_other_run_directory(run: Path, tmp_path: Path, refused: Run) -> None:
    for flags in (["--run-dir", tmp_path / "elsewhere"], ["--overwrite"]):
        assert "leave --run-dir and --overwrite out" in refused("train", "--resume", run, *flags)


def test_an_unwritable_run_directory(tmp_path: Path, refused: Run) -> None:
    (tmp_path / "file").touch()
    assert "cannot write to the run directory" in refused(
        "train", "--run-dir", tmp_path / "file" / "run", *TINY
    )


def test_resuming_something_else(run: Path, tmp_path: Path, refused: Run) -> None:
    assert "no run at" in refused("train", "--resume", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a run directory" in refused("train", "--resume", tmp_path / "empty")
    assert "leave --config and --recipe out" in refused("train", "--resume", run, "--config", "x.yaml")
    # The same value in another spelling is no change.
    assert main(["train", "--resume", str(run), "--eps", "51/510", "--stop-after", "1"]) == 0
    assert "trains by dynat, not by madry" in refused("train", "--resume", run, "--method", "madry")
    for flags in (["--lr", "0.5"], ["--seed", "9"], ["--steps", "7"], ["--model", "resnet18"]):
        line = refused("train", "--resume", run, *flags)
        assert "--resume continues a run exactly as it began" in line
        assert flags[0].strip("-") in line


def test_two_processes_on_one_run(run: Path, refused: Run) -> None:
    held = RunDir.open(run)
    assert "is in use by another" in refused("train", "--resume", run)
    held.close()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def other_architecture(path: Path) -> None:
    """Weights of another network, with a sidecar that is right about their bytes but not about their kind."""
    about = json.loads(path.with_suffix(".json").read_text())
    save_file({"net.conv.weight": torch.zeros(1)}, path)
    about["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(about))


def not_json(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def foreign_json(path: Path) -> None:
    path.with_suffix(".json").write_text("{}")


def wrong_type(path: Path) -> None:
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**about, "eval_eps": None}))


def lacking(path: Path) -> None:
    about = json.loads(path.with_suffix(".json").read_text())
    del about["num_classes"]
    path.with_suffix(".json").write_text(json.dumps(about))


DAMAGES = {
    truncate: "is damaged or was changed: it is truncated",
    flip_a_byte: "is damaged or was changed: sha256",
    other_architecture: "is not a small",
    not_json: "is not JSON",
    foreign_json: "is not a fastdynat checkpoint",
    lacking: "lacks 'num_classes'",
    wrong_type: "eval_eps must be float, got null",
    Path.unlink: "no weights at",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(run: Path, refused: Run, damage: Callable[[Path], None]) -> None:
    weights = run / "last" / "model.safetensors"
    damage(weights)
    for argv in (["eval", run, "--checkpoints", "last"], ["train", "--resume", run]):
        assert re.search("is damaged or was changed|is missing from the checkpoint", refused(*argv))
    # Weights that were taken out of their folder are checked on their own.
    with pytest.raises(UserError, match=DAMAGES[damage]):
        load_network(weights)


def test_damaged_training_state(run: Path, refused: Run) -> None:
    before = (run / "config.yaml").read_bytes()
    state = (run / "last" / "state.pt").resolve()
    good = state.read_bytes()
    for content in (good[:1000], b"", b"not a checkpoint", b"broken\n", pickle.dumps({"a": 1})):
        state.write_bytes(content)
        assert "is damaged or was changed" in refused("train", "--resume", run, "--epochs", "9")
        with pytest.raises(UserError, match="is truncated or not a training state"):
            read_training_state(state)
    torch.save({"weights": torch.zeros(1)}, state)
    with pytest.raises(UserError, match="is not a fastdynat training state"):
        read_training_state(state)
    state.unlink()
    assert "is missing from the checkpoint" in refused("train", "--resume", run)
    assert (run / "config.yaml").read_bytes() == before


def test_one_flipped_bit_of_momentum_is_noticed(run: Path, refused: Run) -> None:
    """torch.load does not check the tensors' bytes."""
    state = (run / "last" / "state.pt").resolve()
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert "is damaged or was changed" in refused("train", "--resume", run)


def test_checkpoints_of_other_runs(run: Path, tmp_path: Path, refused: Run) -> None:
    other = tmp_path / "other"
    assert main(["train", "--method", "madry", "--run-dir", str(other), *TINY]) == 0
    last = (run / "last").resolve()
    shutil.rmtree(last)
    shutil.copytree(other / "last", last)
    assert "is a small of madry, this run's is a small of dynat" in refused("train", "--resume", run)
    # Only the state exchanged, and the manifest made to fit.
    shutil.rmtree(last)
    assert main(["train", "--run-dir", str(run), *TINY, "--overwrite", "--stop-after", "1"]) == 0
    shutil.copy(other / "last" / "state.pt", run / "last" / "state.pt")
    write_manifest((run / "last").resolve())
    assert "the training state is another run's: method is 'madry'" in refused("train", "--resume", run)


def test_a_broken_manifest(run: Path, refused: Run) -> None:
    manifest = (run / "last" / "checkpoint.json").resolve()
    for content in ("{", "{}", '{"format": "x", "sha256": {}}'):
        manifest.write_text(content)
        assert "not a fastdynat manifest" in refused("train", "--resume", run)
    manifest.unlink()
    assert "is not a fastdynat checkpoint" in refused("eval", run, "--checkpoints", "last")


def test_damaged_metrics(run: Path, refused: Run) -> None:
    (run / "metrics.jsonl").write_text('{"epoch": 1')
    message = refused("train", "--resume", run)
    assert (
        "metrics.jsonl, line 1 is not JSON: it is truncated or not a run's metrics; move it away" in message
    )


def test_a_copy_that_followed_the_links_resumes(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", symlinks=False))
    assert not (copy / "last").is_symlink()
    for path in (run, copy):
        assert main(["train", "--resume", str(path), "--quiet"]) == 0
    assert (copy / "last").is_symlink()
    assert (copy / "last" / "model.safetensors").read_bytes() == (
        run / "last" / "model.safetensors"
    ).read_bytes()


def test_a_state_file_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "owned",)

    torch.save(Evil(), tmp_path / "state.pt")
    with pytest.raises(UserError, match="is truncated or not a training state"):
        read_training_state(tmp_path / "state.pt")
    assert not (tmp_path / "owned").exists()


def test_other_training_images(run: Path, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainSplit.train_images

    def changed(split: TrainSplit) -> ImageSet:
        images = real(split)
        images.images[0, 0, 0, 0] ^= 1
        return images

    monkeypatch.setattr(TrainSplit, "train_images", changed)
    assert re.search("data", refused("train", "--resume", run))


def test_eval_requests(run: Path, tmp_path: Path, refused: Run) -> None:
    assert "did you mean" in refused("eval", run, "--attacks", "clean,pdg20")
    assert "eps must be above 0" in refused("eval", run, "--eps", "0")
    for place in (tmp_path / "no" / "x.json", tmp_path):
        assert f"cannot write {place}" in refused("eval", run, "--json", place)
    assert "seed must be in" in refused("eval", run, "--seed", "99999999999999999999")
    assert "no run at" in refused("eval", tmp_path / "nowhere")
    assert "needs --eps" in refused("eval", run, "--norm", "l2")
    assert "--num-images must be >= 1, got 0" in refused("eval", run, "--num-images", "0")
    shutil.rmtree(run / "checkpoints")
    assert "has no best checkpoint" in refused("eval", run)


def image_folder(root: Path, classes: int, size: int) -> Path:
    for split in ("train", "test"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_eval_on_data_of_another_kind(run: Path, tmp_path: Path, refused: Run) -> None:
    folder = image_folder(tmp_path / "images", classes=3, size=32)
    line = refused("eval", run, "--data", "imagefolder", "--data-dir", folder)
    assert "was trained on digits (10 classes" in line
    assert "imagefolder has 3 classes" in line


def test_images_that_do_not_fit(tmp_path: Path, refused: Run) -> None:
    folder = image_folder(tmp_path / "images", classes=2, size=4)
    flags = ["--data", "imagefolder", "--data-dir", folder, "--val-size", "2", "--batch-size", "2", "--quiet"]
    line = refused("train", "--run-dir", tmp_path / "run", *flags, "--model", "torchvision:alexnet")
    assert "4" in line
    image = folder / "train" / "class1" / "3.png"
    truncate(image)
    assert str(image) in refused("train", "--run-dir", tmp_path / "run", *flags, "--model", "small")
    image_folder(tmp_path / "mixed", classes=2, size=8)
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "train" / "class0" / "9.png")
    flags[3] = tmp_path / "mixed"
    assert "--image-size" in refused("train", "--run-dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_start_killed_before_its_configuration_was_written_blocks_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".config.yaml.tmp"):
        (run / name).touch()
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "1"]) == 0
    assert not (run / ".config.yaml.tmp").exists()
