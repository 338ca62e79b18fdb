"""What is fast on this machine: known from its capabilities, or measured once and remembered."""

from fastdynat.machine import capability, half_types, processor, quiet_clock, race, racing
from fastdynat.tuning.choices import (
    MARGIN,
    Choice,
    choice_table,
    choose,
    faster_types,
    remembered,
    slower_than_float32,
)
from fastdynat.tuning.convolution_costs import Convolution, Costs
from fastdynat.tuning.workload import ANY, Layer, Workload

__all__ = [
    "ANY",
    "MARGIN",
    "Choice",
    "Convolution",
    "Costs",
    "Layer",
    "Workload",
    "capability",
    "choice_table",
    "choose",
    "faster_types",
    "half_types",
    "processor",
    "quiet_clock",
    "race",
    "racing",
    "remembered",
    "slower_than_float32",
]
