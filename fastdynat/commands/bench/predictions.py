"""Predicted gains of the optimisations, from before a GPU measured them; see ``bench --switches``.

For one training step of DYNAT with ResNet-18 (guide ResNet-18, batch 128, PGD-10) on an H200 in bf16, unless
said otherwise: 12 to 14 ms, of which 4.8 ms is arithmetic. Bytes and launches are counted, times at 4.3 TB/s
and about 1.2 us a launch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fastdynat.terminal.consoles import AS_IS, PlainTable

UNMEASURED = "not measured yet"


@dataclass(frozen=True)
class Lever:
    """A lever with its prediction.

    Attributes:
        name: the flag's name where it is a switch of `bench --switches`.
        gain: how many times faster a step is with it, the others being on.
        why: what was counted.
        check: what says that the results are right.
    """

    name: str
    gain: str
    why: str
    check: str


LEVERS = (
    Lever(
        "amp",
        "2 to 3",
        "tensor cores, and half the bytes of every activation",
        "--check-fidelity, and beside every bench row",
    ),
    Lever(
        "channels_last",
        "1.3 to 2",
        "bf16 convolutions on tensor cores read it; else two transposes around each",
        "tests",
    ),
    Lever(
        "compile",
        "1.2 to 1.3",
        "one kernel between two convolutions: 12.4 MB per image and attack step for 18.9, 83 launches for "
        "131",
        "first gradients compared with eager's",
    ),
    Lever(
        "mask and residual sum of the gradient",
        "in compile",
        "Inductor already makes one kernel of both between two convolutions' gradients (its code for two "
        "residual blocks)",
        "test: pointwise kernels between convolutions",
    ),
    Lever(
        "fold",
        "1.00 to 1.02",
        "bias and ReLU move the bytes that batch norm and ReLU do; needed by fused_conv",
        "tried in float64",
    ),
    Lever(
        "fused_conv",
        "1.05 compiled, 1.15 to 1.25 not",
        "saves 2.2 MB per image and attack step (0.66 ms) and 17 launches; without compile, up to four "
        "passes become one. With mask and residual sum inside the gradient's convolution, which only cuDNN's "
        "own interface offers, it would be 1.12",
        "table against the definition at first contact; timed layer by layer",
    ),
    Lever(
        "refolding in one pass",
        "1.02 to 1.03",
        "28 launches per step for 160 (ResNet-18); 67 MB are 16 us. One kernel for all weights would save "
        "0.2 % more",
        "tests: float64 formula, launches counted",
    ),
    Lever(
        "weights kept in bf16",
        "1.01",
        "autocast would convert 20 frozen weights at each of 20 passes",
        "tests: no weight is cast",
    ),
    Lever(
        "closed_form", "1.01 to 1.02", "8 launches become one at every attack step", "table at first contact"
    ),
    Lever(
        "kernels",
        "1.01 to 1.03",
        "step, projection and clamp are one launch for six; 0.2 to 0.6 % of the bytes",
        "table at first contact",
    ),
    Lever(
        "graphs",
        "1.3 to 2",
        "Python and the dispatcher take 1.4 ms per attack step, the GPU 0.9 to 1.3",
        "one step compared",
    ),
    Lever(
        "guide_stream",
        "1.03 to 1.07",
        "the guide is 11 % of the arithmetic; its backward pass fills processors that 4x4 and 8x8 layers "
        "leave idle",
        "tests: order of all accesses; gradients with and without",
    ),
    Lever(
        "grad_checkpointing",
        "0.92 to 0.96",
        "slower, for memory: a second forward pass of model and guide in the update, 2 of about 28 passes",
        "tests: equal gradients",
    ),
    Lever(
        "loader",
        "1 to 1.5",
        "resident: one launch; workers: 5.8 s of one core for an epoch of crops and flips",
        "equal batches",
    ),
    Lever(
        "batches of 256, 512",
        "1.05, 1.10 per image",
        "better filled tiles of the 8x8 and 4x4 layers; recipes dynat-256, dynat-512. Changes the training",
        "the rule's rates",
    ),
    Lever(
        "evaluation beyond 500 images a batch",
        "under 1.03",
        "500 images fill the device (250 tiles at 4x4 on 132 processors); random starts are drawn per "
        "batch, so another size would give other images: not done",
        "-",
    ),
)


def prediction_values() -> list[dict[str, str]]:
    """The table as plain values."""
    return [
        {"lever": lever.name, "predicted": lever.gain, "why": lever.why, "check": lever.check}
        for lever in LEVERS
    ]


def print_predictions(gains: Sequence[Mapping[str, Any]], gpu: bool, console: Console) -> None:
    """The table, with the step's measured gains where they are a GPU's."""
    found = {g["switch"]: f"{g['gain']:.2f} ({g['turned']})" for g in gains if gpu}
    console.print("\nspeed-ups predicted for ResNet-18 on an H200, before any was measured", **AS_IS)
    table = PlainTable("lever", "predicted", "measured", "why", "checked by")
    for lever in LEVERS:
        table.add_row(
            lever.name.replace("_", "-"),
            lever.gain,
            found.get(lever.name, UNMEASURED),
            lever.why,
            lever.check,
        )
    console.print(table)
