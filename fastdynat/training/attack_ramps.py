"""Ramps of the attack's radius and step size over epochs, as pure functions of the update.

Published forms, by their released code:

- IKL (Cui et al. 2024, arXiv 2305.13948; DKLv2/Adv-training-dkl/train_dkl_cifar10.py of jiequancui/DKL): the
  radius of epoch e, counted from 1, of E is eps e / E, and the step size is half of it:
  ``--eps-ramp E --step-size eps/2``.
- ARES (Liu et al. 2023, arXiv 2302.14301; robust_training/adversarial_training.py of thu-ml/ares): the step
  size of epoch e, counted from 0, is step min(e, 5) / 5 and the radius is constant: ``--step-ramp 5
  --ramp-from-zero``.
"""

from collections.abc import Callable

from fastdynat.training.resolved_config import ResolvedAttack, ResolvedOptim


def attack_sizes(
    attack: ResolvedAttack, optim: ResolvedOptim, steps_per_epoch: int
) -> Callable[[int], tuple[float, float]] | None:
    """The function update -> (eps, step size) of the attack; None without a ramp.

    Updates are counted from 0 with those of the burn-in, which attacks nothing; ramps begin after it.
    """
    if not attack.ramps:
        return None
    radius = ramp_share(attack, attack.eps_ramp, steps_per_epoch)
    epochs = attack.eps_ramp if attack.step_ramp is None else attack.step_ramp
    step = ramp_share(attack, epochs, steps_per_epoch)
    before = optim.burn_in * steps_per_epoch

    def sizes(update: int) -> tuple[float, float]:
        own = max(update - before, 0)
        return attack.eps * radius(own), attack.step_size * step(own)

    return sizes


def ramp_share(attack: ResolvedAttack, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The function update of the method -> share of the final size, in a ramp over `epochs`; 0 is no ramp.

    With N epochs, or N updates by ``ramp_by: step``, the shares are 1/N, 2/N, ..., 1, 1, ... or, from zero,
    0, 1/N, ..., 1, 1, ...
    """
    unit = steps_per_epoch if attack.ramp_by == "epoch" else 1
    total = epochs * steps_per_epoch // unit
    first = 0 if attack.ramp_from_zero else 1
    return lambda update: min(update // unit + first, total) / total if total else 1.0
