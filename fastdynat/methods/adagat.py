"""AdaGAT (arXiv 2508.17265): LBGAT without the KL, and a guide that is held back by the model.

    minimise CE(f_g(x), y) + MSE(f_t(x'), f_g(x)) + pull * MSE(sg[f_t(x')], f_g(x)),   x' = PGD on KL(p_t(x)
    || p_t(.))

Facts about the released code: what it runs (pull 0) is LBGAT at alpha 0 to the letter; the last term, which
reaches only the guide, is a line in comments there, with pull 2.5, although the text's point is the
stop-gradient that keeps the guide from becoming much better than the model. It switches the guide to eval
mode while it attacks, which has no effect (the attack does not ask it), and adds 1e-5 inside a logarithm of
its KL, which is constant in the attack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdynat.errors import UserError
from fastdynat.methods import check_numbers, register
from fastdynat.methods.lbgat import Lbgat, LbgatOptions


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


@register("adagat")
class Adagat(Lbgat):
    """`Lbgat` with the guide pulled towards the model's logits on attacked images."""

    options_type = AdagatOptions
    options: AdagatOptions

    def match(self, logits: Tensor, guide_logits: Tensor) -> Tensor:
        distance = super().match(logits, guide_logits)
        return (
            distance + self.options.pull * F.mse_loss(logits.detach(), guide_logits)
            if self.options.pull > 0
            else distance
        )
