"""Each of two ranks reads its own share of the training images in files, each image once."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import DALI
from torch import Tensor

from fastdynat.data import decode as decoder
from fastdynat.data import make_loader, open_train
from fastdynat.data.imagefolder import FileSet

RANKS, BATCH, IMAGES = 2, 8, 22


@pytest.fixture
def files(tmp_path: Path) -> FileSet:
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    found = open_train("imagefolder", tmp_path, val_size=0, seed=0).train_files()
    assert isinstance(found, FileSet)
    return found


def loader(name: str, files: Any, rank: int) -> Any:
    options: dict[str, Any] = {"batch_size": BATCH, "augment": "crop-flip", "seed": 5, "device": "cpu"}
    return make_loader(name, files, workers=int(name == "dali"), ranks=RANKS, rank=rank, **options)


def test_torch_decodes_the_share_of_its_rank(files: FileSet, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = decoder.read_rgb

    def watched(path: Path, size: int | None) -> np.ndarray:
        opened.append(path.name)
        return read(path, size)

    monkeypatch.setattr("fastdynat.data.imagefolder.read_rgb", watched)
    of_ranks = []
    for rank in range(RANKS):
        opened.clear()
        indices = torch.cat([batch.indices for batch in loader("torch", files, rank).epoch(0)])
        assert opened == [Path(os.fsdecode(files.paths[i])).name for i in indices.tolist()]
        of_ranks.append(sorted(opened))
    assert [len(names) for names in of_ranks] == [11, 11]
    assert not set(of_ranks[0]) & set(of_ranks[1])


def requested(made: Any) -> list[bytes]:
    """The file names that a loader asks DALI for in the first epoch."""
    plan = made._plan(0)
    return [bytes(name) for step in range(made.steps_per_epoch) for name in made._request(plan, step)[0]]


@DALI
def test_dali_is_asked_for_the_share_of_its_rank(files: FileSet) -> None:
    asked = []
    for rank in range(RANKS):
        made = loader("dali", files, rank)
        batches = list(made.epoch(0))
        names = requested(made)
        indices: Tensor = torch.cat([batch.indices for batch in batches])
        assert names == [bytes(name) for name in files.paths[indices.numpy()]]
        assert sum(len(batch.x) for batch in batches) == len(names) == 11
        asked.append(set(names))
    assert not asked[0] & asked[1]
