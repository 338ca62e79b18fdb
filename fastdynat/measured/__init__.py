"""What is fast on this machine: known from its capabilities, or measured once and remembered."""

from fastdynat.measured.capability import half_types, processor
from fastdynat.measured.choices import MARGIN, Choice, choose, faster_types, remembered, slower_than_float32, table
from fastdynat.measured.racing import quiet_clock, race

__all__ = [
    "MARGIN",
    "Choice",
    "choose",
    "faster_types",
    "half_types",
    "processor",
    "quiet_clock",
    "race",
    "remembered",
    "slower_than_float32",
    "table",
]
