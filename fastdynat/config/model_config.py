"""Flags of the networks."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.config.switch import Switch


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Networks."""

    model: str = "auto"
    """Network to train: small, small_wide, resnet18, resnet18_s1122, preact_resnet18 (also 34, 50, and
    18_s2222 for 64-pixel images) or wrn-D-W, each also with the suffix -silu, -gn (group norm) or -silu-gn,
    wrn and preact then also with -same (padding of DeepMind's and DyART's code), preact with -raw (projection
    shortcuts that read the block's input before batch norm, as in the code of Wong et al. 2020); rawrn-70-16,
    rawrn-101-2 or raresnet-50 (Peng et al. 2023); convnext-t-cvst, vit-s-cvst, convnext-iso-s-cvst and other
    sizes (convolutional stems of Singh et al. 2023); torchvision:NAME, timm:NAME, or
    path/to/file.py:callable, which returns a module. auto is small for digits, else resnet18."""
    init_from: str | None = None
    """Initial weights of the model: a run directory (its best checkpoint), a .safetensors or .pt file, timm
    or torchvision for the published weights of --model timm:NAME or torchvision:NAME, or
    hf:USER/NAME[@REVISION] on the Hugging Face hub. The weights come with their own pixel normalisation. The
    last layer is reinitialised if the classes differ; every other layer must fit."""
    init_sha256: str | None = None
    """Expected sha256 of the weights at --init-from, in hexadecimal: of the file, or for timm and torchvision
    of the tensors. A run stores the one that it found."""
    freeze: tuple[str, ...] = ()
    """Parameters of the model to freeze, by name: glob patterns that match whole names, with or without the
    leading net., or regular expressions, which begin with ^. A batch norm whose parameters are all frozen
    stays in eval mode, in the attack too. Dropout stays on."""
    guide: str = "auto"
    """Guide network (DYNAT, LBGAT, AdaGAT, HAT and distillation); auto is that of --guide-from, else
    small if the model is small or small_wide, else resnet18_s1122 (the released code's), or for images above
    64 pixels the model's own architecture."""
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
    """Epoch, counted from 0, at whose first step the batch's statistics replace the model's running ones.
    After a burn-in the count starts at 0 again, and they are replaced once more. None is never (DyART's
    release: 1)."""
    logit_scale: float = 1.0
    """In training, losses and attacks use the model's logits divided by this factor; validation and
    checkpoints use the undivided logits. Predictions do not change. Above 1, the model's softmax is sharper
    than the loss asked for, and attacks on its cross-entropy, such as PGD-20, find more adversarial images. A
    guide's logits are not divided; with --init-from, the model's are divided from the first step on. Only for
    networks given by name."""
    normalize: Literal["none", "dataset", "released"] = "none"
    """Mean/std layer inside the networks; inputs are in [0, 1] either way. DYNAT's code has none. released
    uses the constants of published code (CIFAR-10: red has standard deviation 0.2471, not 0.2470; image
    folders: those of ImageNet), or the data set's own if there are none."""
