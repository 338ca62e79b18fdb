"""The machine: its identity, instruction sets, timing, and the cache of what was measured."""

from fastdynat.machine import capability, racing
from fastdynat.machine.cache_folder import replace_text, user_cache
from fastdynat.machine.capability import half_types, processor, vector_bits, versions
from fastdynat.machine.gpu_racing import copy_bandwidth, race_on_gpu
from fastdynat.machine.load import OtherLoad, free_cores
from fastdynat.machine.racing import Clock, one_thread, quiet_clock, race

__all__ = [
    "Clock",
    "OtherLoad",
    "capability",
    "copy_bandwidth",
    "free_cores",
    "half_types",
    "one_thread",
    "processor",
    "quiet_clock",
    "race",
    "race_on_gpu",
    "racing",
    "replace_text",
    "user_cache",
    "vector_bits",
    "versions",
]
