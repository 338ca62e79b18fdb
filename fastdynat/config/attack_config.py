"""Flags of the inner attack."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Inner attack, and the radius of evaluation. Radii and step sizes: 8/255, 0.031, or 8 (read as
    8/255)."""

    attack: Literal["pgd", "apgd"] = "pgd"
    """Algorithm of the inner attack: pgd takes steps of --step-size and trains on the last point; apgd (Croce
    & Hein 2020) adapts its step size and trains on the point with the highest loss. Singh et al. 2023 train
    with apgd and --steps 2."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Threat model."""
    targeted: Literal["none", "random", "least"] = "none"
    """Targeted attack: towards a random class, drawn anew at every update, or towards the class that the
    network finds least likely; none is untargeted."""
    norms: str | None = None
    """Train against several threat models (multi-norm training), such as linf,l2,l1; --norm is then the first
    of them."""
    norm_choice: Literal["alternate", "worst", "average"] = "alternate"
    """With --norms: alternate attacks each batch under one norm, in turn; worst keeps for each image the
    attack with the highest loss; average minimises the mean of the losses under all norms (max and avg of
    Tramer & Boneh 2019)."""
    norm_eps: str = "auto"
    """Radii for --norms, in the same order, such as 8/255,0.5,12. auto is --eps for the first norm and the
    usual radius for each of the others."""
    eps: float | str = "auto"
    """Radius in training, in [0, 1] pixel units; under linf, values above 1 are 8-bit levels (8 is read as
    8/255). auto is the dataset's (for colour images 0.031, under l2 0.5, under l1 12)."""
    step_size: float | str = "auto"
    """Step size of the attack. With --norms it applies to the first norm; under the others it scales with the
    radius. auto is the method's: eps / 4 (0.007 for the published eps of 0.031), more for single-step
    methods."""
    eps_ramp: int = 0
    """Epochs over which the radius in training rises linearly to --eps, and the step size with it unless
    --step-ramp is given; 0 is off. IKL ramps over the whole run. Validation and evaluation always take
    --eval-eps."""
    step_ramp: int | None = None
    """Epochs over which the step size rises linearly to --step-size; None is --eps-ramp, 0 is off. ARES (Liu
    et al. 2023) ramps only the step size, over 5 epochs."""
    ramp_by: Literal["epoch", "step"] = "epoch"
    """Raise radius and step size once per epoch, or at every update."""
    ramp_from_zero: bool = False
    """Start ramps at 0, as ARES does: the N epochs have 0, 1/N, ... of the final size, instead of 1/N, 2/N,
    ..., 1."""
    steps: int | None = None
    """Attack steps; None is the method's: 10 for most methods, 20 for dyart, 5 for ikl, 1 for single-step
    methods such as fgsm_rs, n_fgsm and free."""
    early_steps: int | None = None
    """Changes the algorithm: use this many attack steps in the first --early-share of the epochs; None is
    --steps throughout. Faster; docs/results.md gives the cost in robust accuracy."""
    early_share: float = 0.5
    """Share of the epochs in which --early-steps applies."""
    start: Literal["auto", "none", "uniform", "gaussian"] = "auto"
    """Starting point of the attack: the image, or a random point around it; auto is the method's published
    choice, but with --attack apgd the image instead of a uniform start."""
    attack_bn: Literal["eval", "train", "frozen"] = "eval"
    """Batch norm during the attack: eval uses the running statistics; train uses batch statistics and updates
    the running ones in every forward pass of the attacked network, including a method's pass for its clean
    prediction; frozen uses batch statistics without updating the running ones."""
    eval_eps: float | str = "auto"
    """Radius in validation and evaluation; auto is eps, or 8/255 if eps is the published 0.031."""
    awp: float = 0.0
    """Adversarial weight perturbation around each update, relative to each tensor's norm (usual: 0.005,
    0.01); 0 is off."""
    awp_warmup: int = 0
    """Epochs without weight perturbation at the start."""


def norms_of(attack: AttackConfig) -> tuple[str, ...]:
    """The norms of training: those of `norms`, or `norm` alone."""
    if attack.norms is None:
        return (attack.norm,)
    return tuple(name.strip() for name in attack.norms.split(","))


def given_radii(attack: AttackConfig) -> list[str]:
    """The radius of each of `norms_of` in `norm_eps`; "auto" for what was not given."""
    if attack.norm_eps == "auto":
        return ["auto"] * len(norms_of(attack))
    return [radius.strip() for radius in attack.norm_eps.split(",")]
