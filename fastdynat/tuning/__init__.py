"""Tuning: the fastest precision, memory format and convolution algorithm on this machine.

In reading order:
- `choices`: decisions from capabilities and timings, each with its reason;
- `workload`: the convolutions that are timed; `convolution_costs`: a cost model of Winograd's algorithm;
- `measurements`: stored timings;
- `devices`: the device, precision and compiler of a command, with checks of flags.
"""

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
