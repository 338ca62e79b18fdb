"""Options of the methods that add a divergence or a distance between clean and attacked images."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.errors import UserError
from fastdynat.methods.options.method_options import MOST, MethodOptions, check_numbers

MOST_ITERATIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class TradesOptions(MethodOptions):
    """Options of TRADES; the defaults are the released code's."""

    beta: float = 6.0
    """Weight of the KL term, 1/lambda of the paper; usual: 1 to 10."""

    bn_third_pass: bool = True
    """Let the clean batch move the running statistics once more, after the attacked one."""

    def check(self) -> None:
        check_numbers(self, "beta")


@dataclass(frozen=True, kw_only=True)
class MartOptions(MethodOptions):
    """Options of MART."""

    beta: float = 6.0
    """Weight of the KL term; the released scripts have 5 (ResNet-18) and 6 (WRN-34-10)."""

    floor: float = 0.0
    """Added to 1 - max p_k in the second half of BCE, which it bounds; 0.0001 is the release's, 0 the
    formula."""

    def check(self) -> None:
        check_numbers(self, "beta", "floor")


@dataclass(frozen=True, kw_only=True)
class AlpOptions(MethodOptions):
    """Options of adversarial logit pairing."""

    logit_pairing: float = 1.0
    """Weight of the mean squared difference of the logits (lambda of the paper); usual: 0.5 or 1."""

    def check(self) -> None:
        check_numbers(self, "logit_pairing")


@dataclass(frozen=True, kw_only=True)
class VatOptions(MethodOptions):
    """Options of virtual adversarial training."""

    vat_weight: float = 1.0
    """Weight of the divergence (the paper's alpha)."""

    radius: float | None = None
    """L2 length of the perturbation, pixel units; None is eps, under linf that of the ball's corners: eps
    sqrt(C H W)."""

    xi: float = 0.1
    """L2 length of the finite difference that finds the direction."""

    power_iterations: int = 1
    """Iterations of the power method."""

    search: Literal["power", "pgd"] = "power"
    """Where the perturbation comes from: the power method (the paper's), or PGD on the divergence under the
    run's norm."""

    def check(self) -> None:
        check_numbers(self, "vat_weight")
        for name in ("radius", "xi"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise UserError(f"{name} must be above 0 (L2, pixel units), got {value:g}")
        if not 1 <= self.power_iterations <= MOST_ITERATIONS:
            raise UserError(
                f"power_iterations must be >= 1 and at most {MOST_ITERATIONS}, got {self.power_iterations}"
            )

    def idle(self) -> dict[str, str]:
        return (
            dict.fromkeys(("radius", "xi", "power_iterations"), "needs --search power")
            if self.search == "pgd"
            else {}
        )
