"""Write a training method: what the attack maximises, and what the update minimises.

Run: python examples/04_new_method.py

The same on the command line: fastdynat train --method examples/04_new_method.py:Squeeze --squeeze-weight 0.1
"""

from dataclasses import dataclass

import fastdynat
from fastdynat.attacks import AttackResult, wide
from fastdynat.data import Batch
from fastdynat.methods import AttackDefaults, Inner, Method, MethodOptions, Networks, Outer


@dataclass(frozen=True, kw_only=True)
class SqueezeOptions(MethodOptions):
    """Options of logit squeezing; each becomes a flag."""

    squeeze_weight: float = 0.05
    """Weight of the squared logits."""


class Squeeze(Method[SqueezeOptions]):
    """CE(f(x'), y) + weight * mean f(x')^2, attacked by PGD on the CE (logit squeezing, arXiv 1803.06373)."""

    options_type = SqueezeOptions
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(start="uniform", steps=3)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        """What the attack maximises."""
        return Inner(self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        """What the network minimises; the engine takes the gradients, averages, logs and saves."""
        logits = wide(nets.model(attacked.x_adv))
        fit = self.fit(logits, batch)  # the CE, with smoothed or mixed labels if the run has them
        loss = fit.loss + self.options.squeeze_weight * logits.square().mean()
        return Outer({"model": loss}, {"loss": loss.detach()})


def main() -> None:
    """Train by the method in this file."""
    run = fastdynat.train(
        data="digits",
        method=f"{__file__}:Squeeze",
        squeeze_weight=0.1,
        epochs=2,
        run_dir="runs/example-04",
        overwrite=True,
    )
    print(run)
    print(fastdynat.evaluate(run, attacks="clean,pgd20", eps=0.1, num_images=100))


if __name__ == "__main__":
    main()
