"""The optimisers of --opt: what each of them takes, and its usual numbers."""

from dataclasses import dataclass

from fastdynat.config.optim_config import OptimConfig
from fastdynat.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """One optimiser.

    Attributes:
        lr, weight_decay: where the user gives none. For adamw those of timm's and ARES's recipes for
            transformers; for lion a tenth of that rate and ten times that decay, as Chen et al. 2023 advise
            (arXiv 2302.06675, section 5); for sgd those of DYNAT's release.
        betas: its usual --opt-betas; None if it has none.
        eps: its usual --opt-eps; None if it has none.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float] | None = None
    eps: float | None = None


SGD_KIND = "sgd"
OPTIMIZER_KINDS = {
    SGD_KIND: OptimizerKind(lr=0.1, weight_decay=2e-4),
    "adam": OptimizerKind(lr=1e-3, weight_decay=2e-4, betas=(0.9, 0.999), eps=1e-8),
    "adamw": OptimizerKind(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8),
    "lion": OptimizerKind(lr=1e-4, weight_decay=0.5, betas=(0.9, 0.99)),
}


def usual_betas(optim: OptimConfig) -> tuple[float, float] | None:
    """The betas of `optim`: as given, else its optimiser's."""
    return OPTIMIZER_KINDS[optim.opt].betas if optim.opt_betas is None else optim.opt_betas


def usual_eps(optim: OptimConfig) -> float | None:
    """The epsilon of `optim`: as given, else its optimiser's."""
    return OPTIMIZER_KINDS[optim.opt].eps if optim.opt_eps is None else optim.opt_eps


def usual_decay(optim: OptimConfig) -> float:
    """The weight decay of `optim`: as given, else its optimiser's."""
    return OPTIMIZER_KINDS[optim.opt].weight_decay if optim.weight_decay is None else optim.weight_decay


def check_optimizer(optim: OptimConfig) -> None:
    """Raise UserError for an option that the optimiser of `optim` does not have."""
    kind, name = OPTIMIZER_KINDS[optim.opt], optim.opt
    if optim.nesterov and optim.momentum == 0 and name == SGD_KIND:
        raise UserError("nesterov needs momentum above 0")
    if name != SGD_KIND:
        if optim.momentum != OptimConfig.momentum:
            raise UserError(
                f"momentum {optim.momentum:g}: {name} has --opt-betas in its place; "
                "leave it out, or use --opt sgd"
            )
        for option in ("nesterov", "cycle_momentum"):
            if getattr(optim, option):
                raise UserError(f"{option} is for --opt sgd, not {name}; leave it out")
    for option, usual in (("opt_betas", kind.betas), ("opt_eps", kind.eps)):
        if usual is None and getattr(optim, option) is not None:
            those = " or ".join(k for k, v in OPTIMIZER_KINDS.items() if getattr(v, option[4:]) is not None)
            raise UserError(f"{option}: {name} has none; leave it out, or use --opt {those}")
    betas = usual_betas(optim)
    if betas is not None and not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"opt_betas must be two numbers in [0, 1), got {list(betas)}")
