"""The table by which every operator is verified on the machine at hand: its implementations against its eager form.

Imported at the first check only, and registers all of them.
"""

from fastdynat.ops.checks import batches, conv_relu, projections, rows, starts, steps, winograd

__all__ = ["batches", "conv_relu", "projections", "rows", "starts", "steps", "winograd"]
