"""Options of the methods without an attack, or with Madry's."""

from dataclasses import dataclass

from fastdynat.errors import UserError
from fastdynat.methods.options.method_options import MOST, MethodOptions, check_numbers, check_positive

MOST_REPLAYS = 10_000


@dataclass(frozen=True, kw_only=True)
class NaturalOptions(MethodOptions):
    """Options of natural training."""

    temperature: float = 1.0
    """Divides the logits in the loss; above 1 it makes the teacher of defensive distillation."""

    def check(self) -> None:
        check_positive(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class MadryOptions(MethodOptions):
    """Options of PGD adversarial training."""

    bn_clean_forward: bool = False
    """After the attacked batch, let the clean batch move the running statistics too (as DYNAT's release
    does)."""

    bn_attack_forward: bool = False
    """Before the update, let the attacked batch move the running statistics once more: the look at the
    attack's loss that the release of Rice et al. ends every attack with."""

    bn_clean_after: bool = False
    """After the update, let the clean batch move the running statistics: how that release measures its
    training accuracy."""


@dataclass(frozen=True, kw_only=True)
class FgsmRsOptions(MadryOptions):
    """FGSM-RS is Madry's method with another attack, and has its options."""


@dataclass(frozen=True, kw_only=True)
class NFgsmOptions(MadryOptions):
    """Options of N-FGSM."""

    noise: float = 2.0
    """k: the start is uniform in a ball of k times eps."""

    def check(self) -> None:
        if not 0 < self.noise <= MOST:
            raise UserError(
                f"noise must be above 0 (the paper's is 2), got {self.noise:g}; without noise it is FGSM"
            )


@dataclass(frozen=True, kw_only=True)
class FreeOptions(MethodOptions):
    """Options of free adversarial training."""

    replays: int = 8
    """m: updates per batch. Divide --epochs by it for the cost of natural training over as many epochs."""

    def check(self) -> None:
        if not 1 <= self.replays <= MOST_REPLAYS:
            raise UserError(
                f"replays must be >= 1 (the paper's is 8) and at most {MOST_REPLAYS}, got {self.replays}"
            )


@dataclass(frozen=True, kw_only=True)
class ArdaOptions(MethodOptions):
    """Options of adversarial data augmentation."""

    adversarial_share: float = 0.5
    """Share of each batch's images that are attacked, rounded to whole images."""

    loss_share: float = 0.5
    """Share of the loss that the attacked images have, where a batch has both kinds; 0.23 is Kurakin et al.'s
    (lambda 0.3)."""

    def check(self) -> None:
        check_numbers(self, "adversarial_share", "loss_share", most=1.0)

    def idle(self) -> dict[str, str]:
        one_kind = self.adversarial_share in (0, 1)
        return {"loss_share": "with this --adversarial-share all images are of one kind"} if one_kind else {}
