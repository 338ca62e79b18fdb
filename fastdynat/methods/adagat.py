"""AdaGAT (arXiv 2508.17265): LBGAT without the KL term, and with a guide that the model holds back.

    min  CE(f_g(x), y) + MSE(f(x'), f_g(x)) + pull * MSE(sg[f(x')], f_g(x)),   x' = PGD on KL(p(x) || p(.))

The last term reaches only the guide: sg stops the gradient.

Details of the released code, and how they are treated here:

- with its settings (pull 0) it is LBGAT at alpha 0 exactly. The term with the stop-gradient, which keeps the
  guide from becoming much better than the model and is the point of the paper, is commented out there, with
  pull 2.5.
- it switches the guide to eval mode during the attack, which has no effect: the attack does not use the
  guide.
- it adds 1e-5 inside a logarithm of the attack's KL, which changes no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdynat.errors import UserError
from fastdynat.methods import check_numbers, register_method
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


@register_method("adagat")
class Adagat(Lbgat):
    """LBGAT with the guide pulled towards the model's logits on attacked images."""

    options_type = AdagatOptions
    options: AdagatOptions

    def match(self, logits: Tensor, guide_logits: Tensor) -> Tensor:
        distance = super().match(logits, guide_logits)
        return (
            distance + self.options.pull * F.mse_loss(logits.detach(), guide_logits)
            if self.options.pull > 0
            else distance
        )
