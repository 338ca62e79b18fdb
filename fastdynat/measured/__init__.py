"""What is fast on this machine: known from its capabilities, or measured once and remembered."""

from fastdynat.machine import capability, half_types, processor, quiet_clock, race, racing
from fastdynat.measured.choices import MARGIN, Choice, choose, faster_types, remembered, slower_than_float32, table
from fastdynat.measured.convolutions import Convolution, Costs
from fastdynat.measured.proxy import ANY, Layer, Workload

__all__ = [
    "ANY",
    "MARGIN",
    "Choice",
    "Convolution",
    "Costs",
    "Layer",
    "Workload",
    "capability",
    "choose",
    "faster_types",
    "half_types",
    "processor",
    "quiet_clock",
    "race",
    "racing",
    "remembered",
    "slower_than_float32",
    "table",
]
