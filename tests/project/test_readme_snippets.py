"""Every snippet of README.md runs: Python as it stands there, commands with little data; what is not run says
why.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import tiny_cnn

from fastdynat.commands.main import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
DIGITS = "--train-size 60 --val-size 20 --batch-size 20 --epochs 1 --quiet"
FOLDER = "--val-size 4 --batch-size 4 --epochs 1 --quiet"
FEW = "--num-images 8 --batch-size 8"

# In the README's order: the command, what is put in place of its values or behind it, and "slow" where it
# takes seconds.
RUN: dict[str, str] = {
    "train --method natural --run-dir runs/natural": DIGITS,
    "train --method dynat --run-dir runs/dynat": f"{DIGITS} --steps 1",
    "eval runs/natural runs/dynat --attacks clean,fgsm,pgd20,cw": FEW,
    "train --run-dir RUN --method trades": f"{DIGITS} --steps 1 --boundary-speed 8",
    "train": f"{DIGITS} --steps 1",
    "train --data imagefolder --data-dir cifar10-jpeg --model small --eps 8/255": f"{FOLDER} --steps 1",
    "train --config run.yaml": DIGITS,
    "train --resume RUN": "--epochs 2",
    "eval RUN --attacks clean,pgd20,fast-autoattack --checks --json eval.json": f"{FEW} slow",
    "report RUN... --out report": f"{FEW} slow",
    "export RUN --out Me2026Fast.pt": "",
    "compare --methods madry,dynat,trades --seeds 1,2 --budget-seconds 600 --chart c.svg": f"{DIGITS} --budget-seconds 1 slow",
    "boundary RUN --chart speed.svg": "",
    "doctor": "",
    "doctor --check": "",
    "compare --methods natural,madry,dynat --data imagefolder --data-dir cifar10-jpeg --model small --eps 8/255 --epochs 8 "
    "--lr 0.1 --schedule onecycle --amp --seed 1 --attacks clean,pgd20 --json results.json --chart results.svg": (
        f"{FOLDER} slow"
    ),
    "compare --methods madry,dynat,trades,lbgat,dyart,fgsm_rs --data imagefolder --data-dir cifar10-jpeg --model small "
    "--eps 8/255 --lr 0.1 --schedule onecycle --amp --seed 1 --budget-seconds 240 --attacks clean,pgd20,cw --set lbgat.alpha=0 "
    "--set dyart.steps=10 --set dyart.clip_grad=0.1 --json compare.json --chart compare.svg": (
        "--val-size 4 --batch-size 4 --budget-seconds 1 --quiet slow"
    ),
    "eval RUN --attacks clean,pgd50-10,cw,fast-autoattack --checks": f"{FEW} slow",
    "eval RUN --attacks autoattack": f"{FEW} slow",
    "eval RUN --attacks cwl2,deepfool,fab-min": f"{FEW} slow",
    "eval RUN --norm l2 --eps 0.5 --attacks pgd20,apgd-t": FEW,
    "eval RUN --source OTHER --attacks transfer-pgd20": f"{FEW} --source runs/natural",
    "eval net.py:make_net --weights w.pt --data cifar10 --data-dir D --attacks fast-autoattack": (
        f"{FEW} --data imagefolder --data-dir cifar10-jpeg slow"
    ),
}
NOT_RUN: dict[str, str] = {
    "train --data cifar10 --data-dir D --model resnet18 --amp --compile --epochs 100": "hours, and CIFAR-10",
    "train --recipe rice2020": "hours, and CIFAR-10; test_recipe_tables has its schedule",
    "bench --auto --model small --batch-size 128": "minutes of timing; test_benchmark has the command",
    "bench --model resnet18 --amp --compile --peers --switches": "minutes of compilation; test_benchmark has the command",
    "eval timm:resnet18.a1_in1k --data imagefolder --data-dir D --attacks clean,fast-autoattack": "downloads weights",
    "pip": "installs; CI runs these blocks themselves",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Those of fastdynat in the shell blocks, without comments and line breaks."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ").replace("&&", "\n")
    lines = [line.split(" #")[0] for line in text.split("\n")]
    return [
        " ".join(line.split()).removeprefix("fastdynat ")
        for line in lines
        if line.strip().startswith("fastdynat")
    ]


def test_every_command_is_in_one_of_the_tables() -> None:
    found = ["train" if command == "fastdynat train" else command for command in commands()]
    assert sorted({*found}) == sorted({*RUN, *NOT_RUN} - {"pip"})
    assert not RUN.keys() & NOT_RUN.keys()


def with_values(command: str, values: str) -> list[str]:
    """`command` as a list, its options' values replaced by those in `values`, which may also add options."""
    arguments = shlex.split(command.replace("RUN...", "RUN"))
    options = re.findall(r"(--[a-z-]+)(?: ([^-\s]\S*))?", values.removesuffix("slow"))
    for option, value in options:
        if option in arguments and value:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value] if value else [option]
    return arguments


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the README's commands take."""
    folder = tmp_path_factory.mktemp("readme")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for kind in ("cat", "dog"):
            (folder / "cifar10-jpeg" / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "cifar10-jpeg" / split / kind / f"{i}.jpg")
    (folder / "run.yaml").write_text("method: madry\nsteps: 1\n")
    (folder / "net.py").write_text(
        "from torch import nn\n\n\ndef make_net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))\n"
    )
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 2)
    )
    torch.save(net.state_dict(), folder / "w.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


MADE_FIRST = [name for name in RUN if "--run-dir" in name]


@pytest.fixture(scope="module")
def runs(home: Path) -> Path:
    """The same with the runs that later commands are about."""
    for command in MADE_FIRST:
        assert main(with_values(command, RUN[command])) == 0, command
    return home


def marks(values: str) -> Any:
    return [pytest.mark.slow] if values.endswith("slow") else []


@pytest.mark.filterwarnings("ignore")  # of a network that has seen 60 images much is to be warned of
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=marks(values), id=name[:40])
        for name, values in RUN.items()
        if name not in MADE_FIRST
    ],
)
def test_the_command_runs(command: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    assert main(with_values(command, RUN[command])) == 0
    for option in ("--json", "--chart", "--out"):
        arguments = with_values(command, RUN[command])
        if option in arguments:
            assert (runs / arguments[arguments.index(option) + 1]).exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs_as_it_stands(number: int, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on images and networks of its own; test_readme trains the example method."""
    monkeypatch.chdir(runs)
    code = blocks("python")[number]
    torch.manual_seed(0)
    shape = (1, 32, 32) if "RUN/" in code else (3, 8, 8)
    model = tiny_cnn().train()
    x = torch.rand(16, *shape)
    y = model.eval()(x).argmax(1) if len(x[0]) == 3 else torch.randint(10, (16,))
    names: dict[str, Any] = {
        "model": model,
        "images": x,
        "labels": y,
        "x": x,
        "x_test": x,
        "y_test": y,
        "__name__": "snippet",
    }
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    exec(compile(code, f"README.md, Python block {number}", "exec", dont_inherit=True), names)
    for name in ("adv_images", "x_adv"):
        if name in names:
            moved = (names[name] - x).abs().amax()
            assert 0 < float(moved.detach()) <= 8 / 255 * (1 + 1e-5)
    if "optimizer.step()" in code:
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
