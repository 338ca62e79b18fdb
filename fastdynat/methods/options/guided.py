"""Options of the methods that train a guide beside the model."""

import math
from dataclasses import dataclass
from typing import Literal

from fastdynat.errors import UserError
from fastdynat.methods.options.method_options import MethodOptions, check_given, check_numbers, check_positive
from fastdynat.methods.options.weighted import MailScale

# The class that an attack drives away from, where it is a label that the weights may be about.
COUNTED = {"ce_dynamic": "dynamic", "kl_guide": "dynamic", "ce_true": "true"}


@dataclass(frozen=True, kw_only=True)
class DynatOptions(MethodOptions):
    """Options of DYNAT; the defaults are the released code's."""

    inner_loss: Literal["ce_dynamic", "ce_true", "kl_self", "kl_guide"] = "ce_dynamic"
    """What the attack maximises: cross-entropy to the dynamic or the true label, KL from the model's own or
    the guide's clean prediction."""

    outer_label: Literal["dynamic", "true"] = "dynamic"
    """What the model learns on attacked images."""

    beta: float = 1.0
    """Weight of the model's loss; the release's alternative is 0.2."""

    label_type: Literal["hard", "soft"] = "hard"
    """Dynamic label: the guide's arg-max, or its softmax at `temperature`."""

    temperature: float = 1.0
    """Temperature of soft dynamic labels."""

    guide_mode: Literal["train", "eval"] = "train"
    """Statistics with which the guide makes the label: the batch's, or its running ones (costs one more guide
    pass)."""

    bn_clean_forward: bool = True
    """Let the clean batch move the model's running statistics, after the attacked one."""

    extra_kl_weight: float = 0.0
    """Weight of KL(p(x) || p(x')) added to the model's loss, gradient through both arguments (1 in the AWP
    variant)."""

    awp_objective: Literal["own", "trades"] = "own"
    """What --awp drives up: the model's own loss, or TRADES' with the true labels, as the release does."""

    weighting: Literal["none", "gairat", "mail"] = "none"
    """Weights of the images' cross-entropy."""

    weight_labels: Literal["dynamic", "true"] = "dynamic"
    """The labels with which the weights are computed."""

    weight_from: float | None = None
    """Share of the epochs after which the images are weighted; None is the published 0.5 (gairat) or 0.625
    (mail)."""

    lam: float = -1.0
    """gairat: lambda; the higher, the more equal the weights."""

    slope: float = 10.0
    """mail: s."""

    bias: float = -0.5
    """mail: b."""

    weight_scale: MailScale = "released"
    """mail: factor of the weights, the code's 3 (released) or the one that makes their mean 1
    (normalized)."""

    def check(self) -> None:
        check_positive(self, "beta", "temperature")
        check_numbers(self, "extra_kl_weight")
        check_numbers(self, "lam", "slope", "bias", least=-math.inf)
        check_given(self, "weight_from", most=1.0)
        if self.weighting == "gairat" and COUNTED.get(self.inner_loss) != self.weight_labels:
            raise UserError(
                f"weighting gairat counts how often the attack has not yet left the {self.weight_labels} label, and "
                f"inner_loss {self.inner_loss} has no such label: use --inner-loss "
                f"{'ce_true' if self.weight_labels == 'true' else 'ce_dynamic'}"
            )

    def idle(self) -> dict[str, str]:
        found = {}
        if self.label_type == "hard":
            found["temperature"] = "needs --label-type soft"
        if self.extra_kl_weight > 0:
            found["bn_clean_forward"] = "--extra-kl-weight takes the clean batch through the model anyway"
        if self.weighting == "none":
            found |= dict.fromkeys(("weight_labels", "weight_from"), "needs --weighting gairat or mail")
        if self.weighting != "gairat":
            found["lam"] = "needs --weighting gairat"
        if self.weighting != "mail":
            found |= dict.fromkeys(("slope", "bias", "weight_scale"), "needs --weighting mail")
        return found


@dataclass(frozen=True, kw_only=True)
class LbgatOptions(MethodOptions):
    """Options of LBGAT; the defaults are the released code's."""

    alpha: float = 6.0
    """Weight of KL(p(x) || p(x')), called beta in the released code; published: 0 and 6."""

    alp_weight: float = 0.0
    """Weight of MSE(f(x'), f(x)) of the model's logits; the published ALP form is 1 at alpha 0."""

    freeze_guide: bool = False
    """Learn from a guide that was trained before (--guide-from) and stays as it is, in eval mode: the paper's
    BGAT."""

    bn_clean_forward: bool = True
    """Where no loss needs the model's clean logits, let the clean batch move its running statistics all the
    same."""

    def check(self) -> None:
        check_numbers(self, "alpha", "alp_weight")

    def idle(self) -> dict[str, str]:
        clean = self.alpha > 0 or self.alp_weight > 0
        return (
            {"bn_clean_forward": "the loss takes the clean batch through the model anyway"} if clean else {}
        )


@dataclass(frozen=True, kw_only=True)
class AdagatOptions(LbgatOptions):
    """Options of AdaGAT; the defaults are the released code's."""

    alpha: float = 0.0
    """Weight of KL(p(x) || p(x')) of the model."""

    pull: float = 0.0
    """Weight of MSE(sg[f_t(x')], f_g(x)), which moves only the guide; 2.5 in the release's commented line."""

    def check(self) -> None:
        super().check()
        check_numbers(self, "pull")
        if self.pull > 0 and self.freeze_guide:
            raise UserError(f"pull {self.pull:g}: --freeze-guide leaves nothing to pull; use --pull 0")
