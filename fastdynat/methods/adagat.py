"""AdaGAT (arXiv 2508.17265): LBGAT without the KL, and a guide that is held back by the model.

    minimise CE(f_g(x), y) + MSE(f_t(x'), f_g(x)) + pull * MSE(sg[f_t(x')], f_g(x)),   x' = PGD on KL(p_t(x)
    || p_t(.))

Facts about the released code: what it runs (pull 0) is LBGAT at alpha 0 to the letter; the last term, which
reaches only the guide, is a line in comments there, with pull 2.5, although the text's point is the
stop-gradient that keeps the guide from becoming much better than the model. It switches the guide to eval
mode while it attacks, which has no effect (the attack does not ask it), and adds 1e-5 inside a logarithm of
its KL, which is constant in the attack.
"""

import torch.nn.functional as F
from torch import Tensor

from fastdynat.methods.lbgat import Lbgat
from fastdynat.methods.options.guided import AdagatOptions


class Adagat(Lbgat):
    """`Lbgat` with the guide pulled towards the model's logits on attacked images."""

    name = "adagat"
    options_type = AdagatOptions
    options: AdagatOptions

    def match(self, logits: Tensor, guide_logits: Tensor) -> Tensor:
        distance = super().match(logits, guide_logits)
        return (
            distance + self.options.pull * F.mse_loss(logits.detach(), guide_logits)
            if self.options.pull > 0
            else distance
        )
