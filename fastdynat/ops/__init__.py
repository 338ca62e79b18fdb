"""Operators: one function each, with the same result in every implementation ("backend").

Backends: `eager` (plain torch, any device), `cpp` and `cuda` (csrc/, where it is built), `triton` (kernels/,
CUDA tensors; CPU tensors under TRITON_INTERPRET=1). `auto` takes the fastest one that runs on the tensors and
was found correct on this machine; that is verified at the first use.

In reading order:
- an operator's own file, such as `pgd_step_linf`: eager form, registration, public function;
- `_register`: the dispatcher schema, inferred from the eager form, and the table of implementations;
- `_select` and `_timed`: the choice of the implementation; `_extension`: the compiled extension, if any;
- `_step`, `_rows`, `_layout`: parts shared by the PGD steps, by the operators on logits, and by all;
- `_size`: step sizes and radii, as numbers or as scalars on the device, which a captured graph reads anew;
- `image_draws`: random numbers of images, which attacks draw instead of those of a generator;
- `checks`: the cases on which `fastdynat.verification` compares implementations;
- ``python -m fastdynat.ops.new NAME``: the files of a new operator.
"""

from fastdynat.ops._select import (
    BACKENDS,
    available_backends,
    operators_in_use,
    permits,
    prepare,
    selected_backend,
    set_backend,
    usable,
    use_backend,
)
from fastdynat.ops._size import Size
from fastdynat.ops._step import AttackStep
from fastdynat.ops.attack_logit_grad import AttackGrad, attack_logit_grad
from fastdynat.ops.augment import augment
from fastdynat.ops.dynamic_label_cross_entropy import DynamicLabelLoss, dynamic_label_cross_entropy
from fastdynat.ops.image_conv_grad import image_conv
from fastdynat.ops.pgd_step_l0 import pgd_step_l0
from fastdynat.ops.pgd_step_l1 import pgd_step_l1
from fastdynat.ops.pgd_step_l2 import attack_step_l2, pgd_step_l2
from fastdynat.ops.pgd_step_linf import attack_step_linf, pgd_step_linf
from fastdynat.ops.project_on_hyperplane import project_on_hyperplane
from fastdynat.ops.random_start import random_start
from fastdynat.ops.soft_margin import MarginGrad, soft_margin, soft_margin_grad
from fastdynat.ops.winograd import winograd_conv3x3, winograd_usable, winograd_weights

__all__ = [
    "BACKENDS",
    "AttackGrad",
    "AttackStep",
    "DynamicLabelLoss",
    "MarginGrad",
    "Size",
    "attack_logit_grad",
    "attack_step_l2",
    "attack_step_linf",
    "augment",
    "available_backends",
    "dynamic_label_cross_entropy",
    "image_conv",
    "operators_in_use",
    "permits",
    "pgd_step_l0",
    "pgd_step_l1",
    "pgd_step_l2",
    "pgd_step_linf",
    "prepare",
    "project_on_hyperplane",
    "random_start",
    "selected_backend",
    "set_backend",
    "soft_margin",
    "soft_margin_grad",
    "usable",
    "use_backend",
    "winograd_conv3x3",
    "winograd_usable",
    "winograd_weights",
]
