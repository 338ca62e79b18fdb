"""Published training losses with the names and signatures of their releases; our engine runs the attack.

Change one import line: ``from fastdynat import trades_loss``. Losses, gradients, running statistics and the
mode in which the model is left are those of the release, except for these intended differences:

- the attack runs on a replica of the model (`ReplicaCache`), and what stays constant during the attack (the
  clean prediction, the guide's label) is computed once;
- losses are computed from log-probabilities in at least float32, with nothing added inside a logarithm;
- the start's noise comes from another random stream of the same distribution;
- images outside [0, 1], labels that are not classes of the model, and a `distance` for which the release
  has no attack are refused.

Common arguments: model: images in [0, 1] -> logits (N, K); also wrapped by DataParallel, torch.compile or
        DistributedDataParallel. The last needs broadcast_buffers=False (forward_sync_buffers=False from torch
        2.14), as it does for the releases: two passes in train mode come before ``backward()``.
    x_natural: (N, C, H, W) float32 or float64 images in [0, 1], of the model's dtype.
    y: (N,) integer classes; also a list or a numpy array.
    optimizer: its ``zero_grad`` is called between the attack and the losses; None with ``zero_grad=False``.
    zero_grad: False leaves gradients alone, so that those of several calls add up.
    step_size, epsilon, perturb_steps: of the attack, in pixel units. Each new epsilon needs its own CUDA
        graph and compilation: if it changes at every call, use ``graphs=False``.
    beta: weight of the second term.
    distance: "l_inf"; `trades_loss` also "l_2", which is neither compiled nor captured, and takes no
        step_size.
    speed: `Speed`; its ``output`` applies to model and guide. Without ``amp`` the attack runs in the
        precision of the caller's autocast region.

All return a scalar with its graph, for ``backward()``, and raise UserError for arguments that they refuse.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastdynat.attack_engine.goal import kl_from_log_probs, rival_loss, wide
from fastdynat.compat.inner_attack import InnerAttack
from fastdynat.compat.speed_options import Speed
from fastdynat.errors import UserError
from fastdynat.models.logits import logits_of, with_output
from fastdynat.ops import dynamic_label_cross_entropy


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer | None,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    bn_third_pass: bool = True,
    zero_grad: bool = True,
    **speed: Unpack[Speed],
) -> Tensor:
    """TRADES loss, ``CE(f(x), y) + beta KL(p(x) || p(x'))``; the attack maximises the KL (arXiv 1901.08573).

    Args:
        model: maps images in [0, 1] to logits (N, K).
        x_natural: (N, C, H, W) float images in [0, 1].
        y: (N,) integer classes, or (N, K) probabilities.
        optimizer: its ``zero_grad`` is called between attack and loss; None with ``zero_grad=False``.
        step_size: step of the attack in pixel units.
        epsilon: radius of the attack in pixel units.
        perturb_steps: number of attack steps.
        beta: weight of the KL.
        distance: "l_inf" or "l_2".
        bn_third_pass: repeat the clean forward pass after the attacked one, as the release does, so that
            running statistics are 67 % clean at batch norm's default momentum; without it, 47 %. The pass
            has no graph. Gradients are the release's, except that under dropout the clean term of the KL
            shares its mask with the CE.
        zero_grad: False accumulates gradients over calls.
        speed: `amp`, `compile`, `channels_last`, `graphs`, `fold`, `winograd`, `output`, `rescale` (`Speed`).

    Returns:
        The loss, a scalar with its graph, for ``backward()``.

    Raises:
        UserError: images, labels or numbers that do not fit; the message names the remedy.
    """
    _check_optimizer(optimizer, zero_grad)
    attack = InnerAttack(model, x_natural, y, step_size, epsilon, perturb_steps, distance, speed)
    x_adv = attack.from_own_prediction()
    answer = _begin(model, optimizer, zero_grad, speed)
    clean, attacked = wide(answer(x_natural)), wide(answer(x_adv))
    if bn_third_pass:
        _update_statistics(model, x_natural)
    return (
        F.cross_entropy(clean, attack.labels)
        + beta * kl_from_log_probs(clean.log_softmax(1), attacked).mean()
    )


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer | None,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
    *,
    floor: float = 0.0,
    zero_grad: bool = True,
    **speed: Unpack[Speed],
) -> Tensor:
    """``BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x))``, the attack maximising ``CE(f(x'), y)`` (Wang
    et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples").

    ``BCE = -log p_y(x') - log(floor + 1 - max_{k != y} p_k(x'))``. The release's floor of 0.0001 caps the
    second term at 9.2, where it has no gradient. Without a floor it is exact: 150, with its gradient, at a
    logit gap of 150.
    """
    if not 0 <= floor < 1:
        raise UserError(f"floor must be in [0, 1), got {floor:g}; MART's release has 0.0001")
    _check("mart_loss", distance, optimizer, zero_grad)
    attack = InnerAttack(
        model, x_natural, y, step_size, epsilon, perturb_steps, distance, speed, one_class="mart_loss"
    )
    x_adv = attack.from_classes(attack.labels)
    answer = _begin(model, optimizer, zero_grad, speed)
    clean, attacked = wide(answer(x_natural)).log_softmax(1), wide(answer(x_adv))
    boosted = F.cross_entropy(attacked, attack.labels) + rival_loss(attacked, attack.labels, floor).mean()
    missed = -clean.gather(1, attack.labels[:, None])[:, 0].expm1()
    return boosted + beta * (kl_from_log_probs(clean, attacked) * missed).mean()


def dynat_loss(
    model: nn.Module,
    guide: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer | None,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    bn_clean_forward: bool = True,
    zero_grad: bool = True,
    **speed: Unpack[Speed],
) -> Tensor:
    """``CE(g(x), y) + beta CE(f(x'), l)`` with the label ``l = argmax g(x)`` of the guide g, the attack
    maximising ``CE(f(x'), l)`` (DYNAT, arXiv 2408.13102; `fastdynat.methods.dynat`).

    The guide is put in train mode and run once; `optimizer` has both networks' parameters. bn_clean_forward:
    after the attacked images, update the model's running statistics with the clean ones, as a pass of the
    release does whose result is unused.

    beta: the release ignores beta, which its script sets to 6, and minimises the loss with beta = 1, the
    default here. Other values take effect here, with a warning.
    """
    _check("dynat_loss", distance, optimizer, zero_grad)
    if beta != 1:
        _warn_of_beta(float(beta))
    attack = InnerAttack(
        model, x_natural, y, step_size, epsilon, perturb_steps, distance, speed, one_class="dynat_loss"
    )
    guided = dynamic_label_cross_entropy(_answers(guide.train(), speed)(x_natural), attack.labels)
    x_adv = attack.from_classes(guided.predictions)
    answer = _begin(model, optimizer, zero_grad, speed)
    fit = dynamic_label_cross_entropy(answer(x_adv), guided.predictions)
    if bn_clean_forward:
        _update_statistics(model, x_natural)
    return guided.loss + beta * fit.loss


def lbgat_loss(
    model: nn.Module,
    model_teacher: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer | None,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    zero_grad: bool = True,
    **speed: Unpack[Speed],
) -> Tensor:
    """``MSE(f(x'), g(x)) + CE(g(x), y) + beta KL(p(x) || p(x'))``, the attack maximising the KL (LBGAT, Cui
    et al. 2021, arXiv 2011.11164). The teacher g is run once, in the mode it is in.
    """
    _check("lbgat_loss", distance, optimizer, zero_grad)
    attack = InnerAttack(
        model, x_natural, y, step_size, epsilon, perturb_steps, distance, speed, one_class="lbgat_loss"
    )
    x_adv = attack.from_own_prediction()
    answer, teach = _begin(model, optimizer, zero_grad, speed), _answers(model_teacher, speed)
    attacked, clean, taught = wide(answer(x_adv)), wide(answer(x_natural)), wide(teach(x_natural))
    kl = kl_from_log_probs(clean.log_softmax(1), attacked).mean()
    return F.mse_loss(attacked, taught) + F.cross_entropy(taught, attack.labels) + beta * kl


def _check(name: str, distance: str, optimizer: Optimizer | None, zero_grad: bool) -> None:
    if distance == "l_2":
        raise UserError(
            f"{name} has no attack for distance 'l_2', for which its release trains on noise; use "
            "distance='l_inf'"
        )
    _check_optimizer(optimizer, zero_grad)


def _check_optimizer(optimizer: Optimizer | None, zero_grad: bool) -> None:
    if optimizer is None and zero_grad:
        raise UserError(
            "optimizer=None: there are no gradients to set to zero; pass zero_grad=False, or the optimizer"
        )


def _begin(
    model: nn.Module, optimizer: Optimizer | None, zero_grad: bool, speed: Speed
) -> Callable[[Tensor], Tensor]:
    """Set train mode and clear gradients, in the releases' order; returns images -> logits."""
    model.train()
    if optimizer is not None and zero_grad:
        optimizer.zero_grad()
    return _answers(model, speed)


def _answers(model: nn.Module, speed: Speed) -> Callable[[Tensor], Tensor]:
    network = with_output(model, speed.get("output"))
    return lambda x: logits_of(network(x), len(x))


@cache
def _warn_of_beta(beta: float) -> None:
    warnings.warn(
        f"dynat_loss multiplies the model's loss by beta {beta:g}; DYNAT's release ignores beta, which its "
        "script sets to 6. Leave beta out for the release's loss",
        stacklevel=3,
    )


def _update_statistics(model: nn.Module, x: Tensor) -> None:
    """A forward pass for its effect on the running statistics alone."""
    if next(model.buffers(), None) is None:
        return
    # DistributedDataParallel would prepare for a backward pass that never comes.
    network = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.no_grad():
        network(x)
