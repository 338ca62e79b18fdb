"""Flags of the networks."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.config.switch import Switch


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Networks."""

    model: str = "auto"
    """Network to train: small, resnet18, resnet18_s1122, preact_resnet18, wrn-D-W (each also with -silu, -gn
    or -silu-gn for SiLU, group norm, both; wrn then also with -same, the padding of DeepMind's and DyART's
    code), torchvision:NAME, timm:NAME, or path/to/file.py:callable, which returns a module; auto is small for
    digits, else resnet18."""
    guide: str = "auto"
    """Guide network (DYNAT, LBGAT, AdaGAT, HAT and distillation); auto is that of --guide-from, else
    resnet18_s1122 (the released code's), or small if the model is small."""
    guide_from: str | None = None
    """Run directory (its best checkpoint) or .safetensors file with the guide's weights: the frozen guide
    of hat, ard, rslad, iad and distillation, or where a guide's own training starts."""
    bn_momentum: float | None = None
    """Momentum of batch norm: the weight of a new batch in the running statistics; None keeps the network's
    own, which is 0.1 in the built-in networks."""
    sync_bn: Switch = "auto"
    """With several processes (torchrun), on computes batch norm's training statistics over the images of all
    processes, so that they do not depend on the world size; off computes them over each process's own images
    and averages the running statistics after each update. auto is on if a process has fewer than 32 images of
    a micro-batch (--batch-size / processes / --grad-accum-steps), and with one process, where it has no
    effect until the run is resumed on several. The attack is synchronised too with --attack-bn train or
    frozen; with eval it communicates nothing."""
    bn_reset_epoch: int | None = None
    """Epoch at whose first step the model's running statistics are replaced by those of the batch, counted
    from 0, and again from 0 after the burn-in; None is never (DyART's release: 1)."""
    normalize: Literal["none", "dataset", "released"] = "none"
    """Mean/std layer inside the networks; inputs are in [0, 1] either way. DYNAT's code has none. released
    uses the constants of published code (CIFAR-10: red has standard deviation 0.2471, not 0.2470), or the
    data set's own if there are none."""
