"""Checks of every operator: its cases, on which each implementation is compared with the eager form.

One module per operator or family, each of which registers its checks. Imported at the first check only.
"""

from fastdynat.ops.checks import (
    augment_cases,
    conv_relu_cases,
    hyperplane_cases,
    image_conv_grad_cases,
    row_cases,
    start_cases,
    step_cases,
    winograd_cases,
)

__all__ = [
    "augment_cases",
    "conv_relu_cases",
    "hyperplane_cases",
    "image_conv_grad_cases",
    "row_cases",
    "start_cases",
    "step_cases",
    "winograd_cases",
]
