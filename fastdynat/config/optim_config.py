"""Flags of optimiser and schedule."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule."""

    epochs: int | None = None
    """Epochs; None is 100, or 15 for digits."""
    opt: Literal["sgd", "adam", "adamw", "lion"] = "sgd"
    """Optimiser: SGD with momentum, Adam with L2 weight decay, AdamW with decoupled weight decay, or Lion
    (sign of a momentum, decoupled weight decay)."""
    lr: float | None = None
    """Peak learning rate; None is 0.1 for sgd (0.03 for digits), 0.001 for adam and adamw, 0.0001 for
    lion."""
    opt_betas: tuple[float, float] | None = None
    """adam, adamw, lion: beta1 and beta2, the decays of the running averages; None is 0.9 0.999, for lion 0.9
    0.99."""
    opt_eps: float | None = None
    """adam, adamw: epsilon added to the denominator; None is 1e-8."""
    momentum: float = 0.9
    """SGD momentum."""
    cycle_momentum: bool = False
    """onecycle, triangular: cycle the momentum inversely to the learning rate, between --max-momentum and
    --base-momentum, instead of --momentum. This is the default of torch's OneCycleLR and CyclicLR, and so of
    most releases that use them."""
    base_momentum: float | None = None
    """Momentum at the highest learning rate; None is torch's, 0.85 for onecycle and 0.8 for triangular."""
    max_momentum: float | None = None
    """Momentum at the lowest learning rate; None is torch's, 0.95 for onecycle and 0.9 for triangular."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float | None = None
    """Weight decay: L2 for sgd and adam, decoupled for adamw and lion; None is 2e-4 for sgd and adam, 0.05
    for adamw, 0.5 for lion."""
    decay_norms: bool = True
    """Apply weight decay to the parameters of normalisation layers, too; --no-decay-norms exempts them
    (DyART, Gowal et al.)."""
    decay_exempt: tuple[Literal["biases", "1d", "listed"], ...] = ()
    """Parameters without weight decay, beside those of --no-decay-norms: biases; 1d, all parameters with one
    dimension, and biases; listed, those that the network returns from no_weight_decay(), such as position
    embeddings. timm's default is 1d listed."""
    layer_decay: float | None = None
    """Layer-wise learning rate decay: each layer's learning rate is this factor times the next layer's; the
    last layers train at the full rate. Layers are timm's for timm:NAME, residual blocks for built-in
    networks. None is 1."""
    head_lr_scale: float = 1.0
    """Factor on the learning rate of the last linear layer, also of a guide that is trained. --logit-scale
    divides the model's logits alone, so to balance it this suits methods without a trained guide."""
    burn_in: int = 0
    """Number of epochs, out of --epochs, of natural training (cross-entropy on clean images, at the peak
    rate) before the method starts. The method starts from the weight average, if there is one, with a fresh
    optimiser; schedule, warm-ups and ramps count from there. --clip-grad does not apply to the burn-in."""
    burn_in_lr: float | None = None
    """Learning rate of the burn-in; None is --lr."""
    schedule: Literal["release", "multistep", "cosine", "onecycle", "triangular", "constant"] = "release"
    """Learning rate schedule. release is that of DYNAT's code (one epoch at lr/5, then lr, divided by 10
    after 75 % and again after 90 %); triangular goes from 0 to lr and back to 0."""
    schedule_epochs: int | None = None
    """Length of the schedule in epochs; None is the run's, without --burn-in. A run with fewer --epochs ends
    before its schedule does."""
    warmup_epochs: float = 0.0
    """cosine, multistep, constant: epochs of linear warm-up of the learning rate, from --warmup-lr; may be
    fractional."""
    warmup_lr: float | None = None
    """Learning rate at the start of the linear warm-up; None is lr / 100."""
    warmup_prefix: bool = False
    """cosine: start the cosine after the warm-up, at --lr, instead of at the first update (as in timm)."""
    min_lr: float = 0.0
    """cosine, triangular: final learning rate."""
    warmup: float | None = None
    """onecycle, triangular: position of the peak, as a share of the run; None is 0.3 for onecycle, 0.5 for
    triangular."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """multistep: positions of the drops, as shares of the run."""
    gamma: float = 0.1
    """multistep: factor of each drop."""
    schedule_by: Literal["step", "epoch"] = "step"
    """cosine, onecycle, triangular, --warmup-epochs: update learning rate and cycled momentum at every
    step, or once per epoch, as many releases do."""
    schedule_ahead: int = 0
    """Run the schedule of learning rate and cycled momentum this many updates ahead (epochs, with
    --schedule-by epoch): with 1, the rate drops one update early (Rice et al.)."""
    optimizers: Literal["separate", "joint"] = "separate"
    """One optimiser per network, or one for both. They differ in gradient clipping, where joint uses the
    joint norm, and with --amp fp16, where an overflow in one network makes joint skip the update of both."""
    grad_accum_steps: int = 1
    """Cut each batch into this many micro-batches, attack them one after the other, and make one update from
    the sum of their gradients: less memory, the same update. --batch-size still counts the images of an
    update. Batch norm sees one micro-batch at a time."""
    zero1: bool = False
    """With several processes (torchrun), shard the optimiser's state (ZeRO stage 1): each process keeps that
    of some of the weights, updates those weights and broadcasts them. The update is the same. Rules
    out CUDA graphs."""
    label_smoothing: float = 0.0
    """Label smoothing s in every cross-entropy: with K classes, the label's class gets 1 - s + s/K and each
    other class s/K, as in torch and timm. The attack's goal smooths mixed labels only, not plain ones."""
    clip_grad: float = 0.0
    """Clip the gradient norm to this; 0 is off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; 0 is off. The average is updated
    at every step (see --ema-every), and is what is validated and saved as the model."""
    swa: bool = False
    """Stochastic weight averaging in place of --ema: the equally weighted mean of the weights at the end of
    each epoch (see --ema-every) from --ema-from on."""
    ema_every: Literal["auto", "step", "epoch"] = "auto"
    """Update the weight average at every step, or at the end of every epoch; auto is step for --ema, epoch
    for --swa."""
    ema_from: int = 0
    """Epochs before averaging starts; until then the average is a plain copy of the weights. Averaging starts
    from the weights after the next update, at its full decay."""
    ema_warmup: float = 0.0
    """Share of the run in which the average is a plain copy; after that, its decay at step s is
    min(ema, (1 + s) / (10 + s)). With 0, the decay is ema from the first step on."""
    ema_buffers: Literal["average", "copy", "recompute"] = "average"
    """Batch norm statistics of the weight average: averaged like the weights, copied from the model, or
    recomputed at the end of each epoch by a forward pass over its clean images."""
