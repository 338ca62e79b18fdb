"""Options of the methods that learn from a teacher."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.methods.options.method_options import MethodOptions, check_given, check_numbers, check_positive

KlMean = Literal["tenth", "entries", "batch"]


@dataclass(frozen=True, kw_only=True)
class HatOptions(MethodOptions):
    """Options of HAT; the defaults are the published ones for ResNet-18 on CIFAR-10."""

    beta: float = 2.5
    """Weight of KL(p(x) || p(x'))."""

    helper_weight: float = 0.5
    """Weight of the helper images' loss (gamma in the paper); 0 leaves TRADES."""

    helper_scale: float = 2.0
    """How far the helper image is, in units of x' - x (h in the paper)."""

    def check(self) -> None:
        check_numbers(self, "beta", "helper_weight", "helper_scale")

    def idle(self) -> dict[str, str]:
        return {"helper_scale": "needs --helper-weight above 0"} if self.helper_weight == 0 else {}


@dataclass(frozen=True, kw_only=True)
class ArdOptions(MethodOptions):
    """Options of ARD; the defaults are the released code's."""

    alpha: float = 1.0
    """Weight of the distillation; 1 - alpha is that of the cross-entropy to the true labels on clean
    images."""

    temperature: float = 30.0
    """Divides the logits of teacher and student in the distillation, which is multiplied by its square."""

    kl_mean: KlMean = "entries"
    """What the KL, summed over K classes, is divided by: K (entries), 10 (tenth), or nothing (batch)."""

    bn_clean_forward: bool = True
    """At alpha 1, let the clean batch move the student's running statistics, after the attacked one."""

    def check(self) -> None:
        check_numbers(self, "alpha", most=1.0)
        check_positive(self, "temperature")

    def idle(self) -> dict[str, str]:
        return (
            {"bn_clean_forward": "--alpha below 1 takes the clean batch through the student anyway"}
            if self.alpha < 1
            else {}
        )


@dataclass(frozen=True, kw_only=True)
class RsladOptions(MethodOptions):
    """Options of RSLAD; the defaults are the released code's."""

    attacked_weight: float = 5 / 6
    """Weight of the KL on attacked images."""

    clean_weight: float = 1 / 6
    """Weight of the KL on clean images."""

    kl_mean: KlMean = "tenth"
    """What the KL, summed over K classes, is divided by: 10 (tenth), K (entries), or nothing (batch)."""

    def check(self) -> None:
        check_numbers(self, "attacked_weight", "clean_weight")


@dataclass(frozen=True, kw_only=True)
class IadOptions(MethodOptions):
    """Options of IAD; the defaults are the released code's."""

    variant: Literal["I", "II"] = "I"
    """Which of the two published losses."""

    alpha: float | None = None
    """Weight of the distillation; 1 - alpha is that of the cross-entropy; None is 1 for variant I, 0.5 for
    II."""

    temperature: float = 1.0
    """Divides the logits in the teacher's term, which is multiplied by its square."""

    beta: float = 0.1
    """Exponent of the teacher's probability for the true class; 0 trusts it always."""

    begin: float | None = None
    """Share of the epochs after which trust is measured; None is 0.3 for variant I, 0.2 for II (60 and 40 of
    200)."""

    bn_clean_passes: bool = True
    """Variant I: let the clean batch move the student's running statistics once before `begin` and twice
    after; else only where a loss needs the clean batch."""

    def check(self) -> None:
        check_given(self, "alpha", "begin", most=1.0)
        check_numbers(self, "beta")
        check_positive(self, "temperature")

    def idle(self) -> dict[str, str]:
        return {"bn_clean_passes": "needs --variant I"} if self.variant == "II" else {}


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(MethodOptions):
    """Options of defensive distillation."""

    temperature: float = 20.0
    """T of teacher and student; the paper tries 1 to 100. The gradient is about T times smaller: raise --lr
    with it."""

    def check(self) -> None:
        check_positive(self, "temperature")
