"""The table by which every operator is verified on the machine at hand: its implementations against its eager
form.

Imported at the first check only, and registers all of them.
"""

from fastdynat.ops.checks import (
    batches,
    projections,
    starts,
)
from fastdynat.ops.checks import (
    conv_relu_cases as conv_relu,
)
from fastdynat.ops.checks import (
    row_cases as rows,
)
from fastdynat.ops.checks import (
    step_cases as steps,
)
from fastdynat.ops.checks import (
    winograd_cases as winograd,
)

__all__ = ["batches", "conv_relu", "projections", "rows", "starts", "steps", "winograd"]
