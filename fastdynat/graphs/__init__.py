"""Functions of tensors, captured once per input signature as a CUDA graph and replayed: one launch instead of hundreds."""

from fastdynat.graphs.call import WARM_UP_CALLS, GraphedCall
from fastdynat.graphs.recorder import CaptureFailed, CudaRecorder, Recorder

__all__ = ["WARM_UP_CALLS", "CaptureFailed", "CudaRecorder", "GraphedCall", "Recorder"]
