"""Other spellings of flags, and flags with a value that may stand bare."""

from collections.abc import Container, Iterator, Sequence
from typing import get_args

from fastdynat.config import AutoAmp, CompileMode, Switch
from fastdynat.errors import UserError

# Spellings of the scripts that people come from: the releases of TRADES, MART, LBGAT, AWP, Rice et al. and
# DYNAT, robustness, torchattacks, RobustBench, timm, and PyTorch's examples. A flag of the command itself
# always wins.
SPELLINGS = {
    "--eps": ("--epsilon", "--attack-eps", "--train-eps", "--adv-eps"),
    "--steps": (
        "--num-steps",
        "--attack-iters",
        "--attack-steps",
        "--pgd-steps",
        "--n-steps",
        "--perturb-steps",
    ),
    "--step-size": ("--alpha", "--pgd-alpha", "--attack-step", "--attack-lr", "--attack-step-size"),
    "--norm": ("--constraint", "--threat-model", "--distance"),
    "--model": ("--arch", "--net", "--network", "--backbone", "-a"),
    "--guide": ("--teacher", "--guide-model", "--teacher-model"),
    "--guide-from": ("--teacher-path", "--teacher-checkpoint"),
    "--weight-decay": ("--wd", "-wd"),
    "--momentum": ("--mom",),
    "--opt": ("--optimizer", "--optim"),
    "--warmup-lr": ("--warmup-lr-init",),
    "--min-lr": ("--lr-min", "--eta-min"),
    "--lr": ("--lr-max", "--learning-rate", "-lr"),
    "--schedule": ("--lr-schedule", "--lr-scheduler", "--scheduler", "--sched"),
    "--epochs": ("--num-epochs", "--n-epochs", "--max-epochs", "--max-epoch", "--nb-epochs"),
    "--clip-grad": ("--grad-clip", "--clip-grad-norm", "--max-grad-norm"),
    "--awp": ("--awp-gamma",),
    "--label-smoothing": ("--smoothing", "--ls"),
    "--ema": ("--ema-decay", "--model-ema-decay"),
    "--batch-size": ("--bs", "--train-batch-size", "-b", "-bs"),
    "--eval-batch-size": (
        "--test-batch-size",
        "--batch-size-test",
        "--val-batch-size",
        "--eval-bs",
        "--test-bs",
    ),
    "--data": ("--dataset", "--data-name", "--dataset-name"),
    "--data-dir": ("--data-path", "--data-root", "--dataroot", "--dataset-path", "--dataset-dir", "--root"),
    "--workers": ("--num-workers", "--n-workers", "--num-data-workers", "-j"),
    "--seed": ("--random-seed", "--manual-seed", "--manualSeed", "--rand-seed"),
    "--image-size": ("--img-size", "--imgsz"),
    "--num-images": ("--n-ex", "--n-examples", "--num-examples"),
    "--run-dir": (
        "--out",
        "--out-dir",
        "--output",
        "--output-dir",
        "--save-dir",
        "--model-dir",
        "--exp-dir",
        "--save-path",
        "-o",
    ),
    "--device": ("--dev",),
    "--attacks": ("--attack",),
    "--quiet": ("-q",),
    "--checks": ("--check",),
}
ALIASES = {spelling: flag for flag, spellings in SPELLINGS.items() for spelling in spellings}
# Switches of other scripts that are a value here.
VALUES = {
    "--no-cuda": "--device=cpu",
    "--cpu": "--device=cpu",
    "--cuda": "--device=cuda",
    "--half": "--amp=fp16",
    "--fp16": "--amp=fp16",
    "--bf16": "--amp=bf16",
    "--no-amp": "--amp=off",
    "--no-compile": "--compile=off",
    "--use-amp": "--amp",
}
# Their value is the number of a GPU.
GPU = ("--gpu", "--gpu-id", "--gpu-ids")
# In some scripts their value is the number of a GPU, in others (Lightning's) how many there are.
GPU_COUNTS = ("--gpus", "--gpu-num")
# Flags with a value that may stand bare.
BARE = {
    "--amp": ("auto", get_args(AutoAmp)),
    "--compile": ("auto", get_args(CompileMode)),
    "--channels-last": ("on", get_args(Switch)),
    "--fold": ("on", get_args(Switch)),
    "--fused-conv": ("on", get_args(Switch)),
    "--winograd": ("on", get_args(Switch)),
    "--graphs": ("on", get_args(Switch)),
}


def normalize(argv: Sequence[str], flags: Container[str]) -> list[str]:
    """`argv` with other scripts' spellings replaced by those among the command's `flags`.

    >>> normalize(["--epsilon=8", "--learning_rate", "0.1", "--gpu", "1"], {"--eps", "--lr", "--device"})
    ['--eps=8', '--lr', '0.1', '--device=cuda:1']
    """
    return list(_replaced(list(argv), flags))


def _replaced(words: list[str], flags: Container[str]) -> Iterator[str]:
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in flags or not name.startswith("-"):
            yield name + equals + value if name in flags else word
        elif name in GPU and "--device" in flags:
            if not equals and words[i : i + 1] and not words[i].startswith("-"):
                value, i = words[i], i + 1
            yield f"--device={_device(name, value)}"
        elif name in GPU_COUNTS and "--device" in flags:
            raise UserError(
                f"{name} may mean one GPU or a number of GPUs: use --device cuda:N for the GPU number N, or "
                "torchrun --nproc-per-node N -m fastdynat ... for N of them"
            )
        elif name in VALUES and not equals and VALUES[name].partition("=")[0] in flags:
            yield VALUES[name]
        else:
            target = ALIASES.get(name)
            yield (target if target is not None and target in flags else name) + equals + value


def _device(flag: str, value: str) -> str:
    if not value:
        return "cuda"
    if not (value.isdecimal() and value.isascii()):
        raise UserError(
            f"{flag} must be the number of one GPU, got {value!r}; or write --device cuda:0, --device cpu"
        )
    return f"cuda:{int(value)}"
