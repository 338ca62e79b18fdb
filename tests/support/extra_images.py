"""Extra images for tests: files of published forms, and the stores packed from them."""

from pathlib import Path

import numpy as np
from rich.console import Console

from fastdynat.data.extra_store import ExtraStore
from fastdynat.data.pack_sources import open_sources
from fastdynat.data.store_writer import pack
from fastdynat.terminal.progress import ProgressDisplay

SILENT = ProgressDisplay(Console(), quiet=True)


def extra_arrays(count: int, side: int = 8, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 NHWC, and labels of ten classes."""
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return images, generator.integers(0, 10, count)


def write_npz(path: Path, count: int, side: int = 8, channels: int = 3, *, compressed: bool = False) -> Path:
    images, labels = extra_arrays(count, side, channels)
    (np.savez_compressed if compressed else np.savez)(path, image=images, label=labels)
    return path


def packed_npz(folder: Path, count: int, side: int = 8, channels: int = 3) -> ExtraStore:
    """The store of `extra_arrays`."""
    sources = open_sources([write_npz(folder / f"{count}.npz", count, side, channels)], None)
    return pack(sources, folder / f"{count}.packed", display=SILENT)
