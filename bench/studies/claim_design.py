"""The runs of the study of DYNAT's claim, in the order in which they are made; docs/studies/dynat-claim.md.

Written down before the first run. Blocks are ordered so that whatever part of them exists is balanced: all
methods with one seed before the next seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

EPOCHS = 60
SEEDS = (1, 2, 3)
EPS, STEP = "8/255", "2/255"
AUTOATTACK_IMAGES = 1000
RESNET = f"{Path(__file__).resolve().parent / 'claim_resnet.py'}:residual_network"
# Equal for all methods: DYNAT's recipe (rate, momentum, weight decay, batch size, steps) with the decay of
# Rice et al. 2020, after which robust overfitting sets in.
COMMON = {
    "data": "imagefolder",
    "eps": EPS,
    "step-size": STEP,
    "steps": "10",
    "batch-size": "128",
    "lr": "0.1",
    "momentum": "0.9",
    "weight-decay": "2e-4",
    "schedule": "multistep",
    "val-size": "1000",
    "val-every": "2",
    "amp": "off",
}
DYNAT = {"method": "dynat", "guide": "small"}
ARMS = {
    "madry": {"method": "madry"},
    "dynat": DYNAT,
    "trades": {"method": "trades", "beta": "6"},
    "lbgat": {"method": "lbgat", "alpha": "0", "guide": "small"},
    # As many epochs of Madry as take DYNAT's seconds.
    "madry-seconds": {"method": "madry"},
    # The other cells of label of the update x label of the attack.
    "dynamic-update": DYNAT | {"inner-loss": "ce_true"},
    "dynamic-attack": DYNAT | {"outer-label": "true"},
    "true-labels": DYNAT | {"inner-loss": "ce_true", "outer-label": "true"},
    # Variants of DYNAT.
    "beta-0.2": DYNAT | {"beta": "0.2"},
    "soft-labels": DYNAT | {"label-type": "soft"},
    "no-inner": DYNAT | {"inner-loss": "kl_self"},
    "large-guide": DYNAT | {"guide": RESNET},
    "guide": {"method": "natural"},
    "guide-before": DYNAT,
}
METHODS = ("madry", "dynat", "trades", "lbgat")
CELLS = ("dynamic-update", "dynamic-attack", "true-labels")
VARIANTS = ("beta-0.2", "soft-labels", "no-inner", "large-guide", "guide", "guide-before")


@dataclass(frozen=True)
class Run:
    """A training of `arm` with `seed`, which also chooses the training images and those held out."""

    arm: str
    seed: int
    images: int = 5000
    model: str = "small"
    augment: str = "crop-flip"

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{self.arm}_{self.model}_{self.images}_{self.augment}_seed{self.seed}"

    def flags(self, data_dir: str, folder: Path, epochs: int, changed: Mapping[str, str]) -> list[str]:
        """Of ``fastdynat train``; `folder` holds the runs, `changed` are other values, for tests."""
        named = {
            **COMMON,
            **ARMS[self.arm],
            "data-dir": data_dir,
            "model": RESNET if self.model == "resnet" else self.model,
            "augment": self.augment,
            "train-size": str(self.images),
            "epochs": str(epochs),
            "seed": str(self.seed),
            "run-dir": str(folder / self.name),
        }
        if self.arm == "guide-before":
            named["guide-from"] = str(folder / Run("guide", self.seed, self.images).name)
        if ARMS[self.arm]["method"] == "natural":
            for key in ("step-size", "steps"):
                del named[key]
        named |= changed
        return [text for key, value in named.items() for text in (f"--{key}", value)]


@dataclass(frozen=True)
class Block:
    """Runs that belong together; one without runs is of measurements of the first one's."""

    name: str
    runs: tuple[Run, ...]


def rows(arms: tuple[str, ...], seeds: tuple[int, ...] = SEEDS, **keys: str | int) -> tuple[Run, ...]:
    """All `arms` with the first seed, then with the second, ..."""
    return tuple(Run(arm, seed, **keys) for seed in seeds for arm in arms)  # type: ignore[arg-type]


BLOCKS = (
    Block("methods", rows(METHODS)),
    Block("seconds", rows(("madry-seconds",))),
    Block("ablation", rows(CELLS)),
    Block("no augmentation", rows(("madry", "dynat"), augment="none")),
    Block("autoattack", ()),  # of the runs of "methods"
    Block("variants", rows(VARIANTS, (1,))),
    Block("10,000 images", rows(("madry", "dynat"), (1,), images=10_000)),
    Block("residual network", rows(("madry", "dynat"), (1,), model="resnet")),
)
RUNS = tuple(run for block in BLOCKS for run in block.runs)


def equal_seconds_epochs(cost: dict[str, float]) -> int:
    """Epochs of Madry that take the seconds of DYNAT's; `cost` are seconds per epoch by method."""
    return round(EPOCHS * cost["dynat"] / cost["madry"])
