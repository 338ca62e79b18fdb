"""Options of the methods that weigh images."""

import math
from dataclasses import dataclass
from typing import Literal

from fastdynat.methods.options.method_options import MethodOptions, check_given, check_numbers

MailScale = Literal["released", "normalized"]
# Share of the run's epochs without weights: 60 of GAIRAT's 120, 75 of MAIL's 120.
GAIRAT_FROM, MAIL_FROM = 0.5, 0.625


@dataclass(frozen=True, kw_only=True)
class GairatOptions(MethodOptions):
    """Options of GAIRAT; the defaults are the released code's."""

    lam: float = -1.0
    """Lambda of the weights; the higher, the more equal they are."""

    weight_from: float = GAIRAT_FROM
    """Share of the epochs after which the images are weighted."""

    def check(self) -> None:
        check_numbers(self, "lam", least=-math.inf)
        check_numbers(self, "weight_from", most=1.0)


@dataclass(frozen=True, kw_only=True)
class MailOptions(MethodOptions):
    """Options of MAIL; the defaults are the released code's."""

    base: Literal["at", "trades"] = "at"
    """The loss that is weighted."""

    slope: float | None = None
    """s of the weights; None is the published 10 (at) or 2 (trades)."""

    bias: float | None = None
    """b of the weights; None is the published -0.5 (at) or 0 (trades)."""

    weight_scale: MailScale = "released"
    """Factor of the weights: the code's 3 (released), or the one that makes their mean 1 (normalized)."""

    weight_from: float = MAIL_FROM
    """Share of the epochs after which the images are weighted."""

    beta: float = 5.0
    """Weight of the KL term of the trades base."""

    def check(self) -> None:
        check_numbers(self, "beta")
        check_numbers(self, "weight_from", most=1.0)
        check_given(self, "slope", "bias", least=-math.inf)

    def idle(self) -> dict[str, str]:
        return {"beta": "needs --base trades"} if self.base == "at" else {}
