"""The value of --aa: a published augmentation policy by name, with its numbers."""

import re
from dataclasses import dataclass

from fastdynat.errors import UserError, unknown_name

TABLES = ("cifar10", "imagenet", "svhn")
NAMES = ("none", "randaugment", "trivialaugment", "autoaugment", "rand", "idbh-weak", "idbh-strong")
MOST_OPERATIONS, MAGNITUDES = 16, 31
TIMM_PART = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")
USAGE = (
    "write none, randaugment:N:M (N operations of magnitude M from 0 to 30), trivialaugment, autoaugment or "
    "autoaugment:cifar10|imagenet|svhn, timm's rand-m9-n2-mstd0.5-inc1, idbh-weak or idbh-strong"
)


@dataclass(frozen=True)
class PolicySpec:
    """A policy by `name` of `NAMES`.

    Attributes:
        operations: of randaugment and rand, operations of an image, one after the other.
        magnitude: of randaugment, the index of the strength, from 0 to 30; of rand, the strength out of 10.
        table: of autoaugment, one of `TABLES`; "" is that of the data.
        spread: of rand, the standard deviation of the strength; above 100 it is uniform up to `magnitude`.
        most: of rand, the largest strength.
        increasing: of rand, whether every operation grows with the strength.
        prob: of rand, the probability of each operation.
    """

    name: str
    operations: int = 2
    magnitude: float = 9
    table: str = ""
    spread: float = 0.0
    most: float = 10.0
    increasing: bool = False
    prob: float = 0.5

    @property
    def own_crop(self) -> bool:
        """True for a policy that crops the images itself, in place of --augment."""
        return self.name.startswith("idbh")


def parse_policy(text: str) -> PolicySpec:
    """Read the value of --aa.

    Raises:
        UserError: an unknown name, or numbers that the policy does not have.
    """
    if text.startswith("rand-") or text == "rand":
        return _timm(text)
    name, *numbers = text.split(":")
    if name not in NAMES or name == "rand":
        raise unknown_name("policy", text, NAMES)
    if name == "autoaugment" and len(numbers) <= 1 and set(numbers) <= set(TABLES):
        return PolicySpec(name, table="".join(numbers))
    if name == "randaugment" and len(numbers) <= 2 and all(re.fullmatch(r"\d{1,3}", n) for n in numbers):
        operations, magnitude = (int(n) for n in (*numbers, *("2", "9")[len(numbers) :]))
        spec = PolicySpec(name, operations, magnitude)
        if 1 <= spec.operations <= MOST_OPERATIONS and spec.magnitude < MAGNITUDES:
            return spec
        raise UserError(
            f"aa {text}: N must be between 1 and {MOST_OPERATIONS} and M between 0 and {MAGNITUDES - 1}"
        )
    if numbers:
        raise UserError(f"aa {text}: {name} does not take {':'.join(numbers)}; {USAGE}")
    return PolicySpec(name)


def _timm(text: str) -> PolicySpec:
    """timm's form, ``rand-m9-mstd0.5-inc1``."""
    found: dict[str, float] = {}
    for part in text.split("-")[1:]:
        match = TIMM_PART.fullmatch(part)
        if match is None or match[1] in found:
            raise UserError(f"aa {text}: cannot read {part!r}; {USAGE}")
        found[match[1]] = float(match[2])
    spec = PolicySpec(
        "rand",
        operations=int(found.get("n", 2)),
        magnitude=found.get("m", 10.0),
        spread=found.get("mstd", 0.0),
        most=found.get("mmax", 10.0) or 10.0,
        increasing=bool(found.get("inc", 0)),
        prob=found.get("p", 0.5),
    )
    whole = all(found.get(key, 0).is_integer() for key in ("m", "n", "mmax", "inc") if key in found)
    if not (whole and 1 <= spec.operations <= MOST_OPERATIONS and spec.prob <= 1 and spec.magnitude <= 100):
        raise UserError(
            f"aa {text}: m, n, mmax and inc are whole numbers, n is between 1 and {MOST_OPERATIONS}, "
            "m at most 100, p at most 1"
        )
    return spec
