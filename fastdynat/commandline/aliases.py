"""Other spellings of flags, and flags with a value that may stand bare."""

from collections.abc import Collection, Sequence
from typing import get_args

from fastdynat.config import AutoAmp, CompileMode, Switch

# Spellings of the scripts that people come from.
ALIASES = {
    "--epsilon": "--eps",
    "--attack-eps": "--eps",
    "--num-steps": "--steps",
    "--attack-iters": "--steps",
    "--attack-steps": "--steps",
    "--alpha": "--step-size",
    "--pgd-alpha": "--step-size",
    "--attack-step": "--step-size",
    "--arch": "--model",
    "--wd": "--weight-decay",
    "--lr-max": "--lr",
    "--lr-schedule": "--schedule",
    "--out": "--run-dir",
}
# Flags with a value that may stand bare.
BARE = {
    "--amp": ("auto", get_args(AutoAmp)),
    "--compile": ("auto", get_args(CompileMode)),
    "--channels-last": ("on", get_args(Switch)),
    "--fold": ("on", get_args(Switch)),
    "--winograd": ("on", get_args(Switch)),
    "--graphs": ("on", get_args(Switch)),
}


def normalize(argv: Sequence[str], own: Collection[str] = ()) -> list[str]:
    """Replace other scripts' spellings, but for flags that are the command's `own`, and give bare flags their value.

    >>> normalize(["--epsilon=8", "--amp", "--epochs", "3"])
    ['--eps=8', '--amp', 'auto', '--epochs', '3']
    """
    out: list[str] = []
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        out.append((flag if flag in own else ALIASES.get(flag, flag)) + equals + value)
        if flag in BARE and not equals:
            default, values = BARE[flag]
            if argv[i + 1 : i + 2] == [] or argv[i + 1] not in values:
                out.append(default)
    return out
