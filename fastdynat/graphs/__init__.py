"""Functions of tensors, captured once per input signature as a CUDA graph and replayed: one launch instead of hundreds."""

from fastdynat.graphs.call import WARM_UP_CALLS, GraphedCall
from fastdynat.graphs.check import Check, Pure, Subject, scaled
from fastdynat.graphs.recorder import CaptureFailed, CudaRecorder, Recorder

__all__ = ["WARM_UP_CALLS", "CaptureFailed", "Check", "CudaRecorder", "GraphedCall", "Pure", "Recorder", "Subject", "scaled"]
