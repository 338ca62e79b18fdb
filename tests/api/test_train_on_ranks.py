"""fastdynat.train within a process group that the caller's program has initialised."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.own import own_net, own_test

import fastdynat
from fastdynat.distributed import join_world, joined_world, world
from fastdynat.errors import UserError
from fastdynat.models.state_digest import state_digest
from fastdynat.training.checkpoint_writer import CheckpointWriter

SLOW = 2.0  # seconds that a checkpoint takes


@contextmanager
def slow_writer() -> Iterator[None]:
    submit = CheckpointWriter.submit

    def slowed(self: CheckpointWriter, write: Any) -> None:
        submit(self, lambda: (time.sleep(SLOW), write()))

    CheckpointWriter.submit = slowed  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckpointWriter.submit = submit  # type: ignore[method-assign]


def _trained(folder: Path) -> tuple[int, str, int, int]:
    """Rank, digest of the returned weights, rows and epoch of what `train` returns on this rank."""
    data = {"train_size": 64, "val_size": 32, "batch_size": 32, "val_every": 2}
    with slow_writer():
        run = fastdynat.train(
            "small", "digits", "madry", steps=1, epochs=2, run_dir=folder, device="cpu", quiet=True, **data
        )
    return world().rank, state_digest(run.model.state_dict()), len(run.metrics), run.about.epoch


def test_all_ranks_return_the_network_that_rank_0_wrote_last(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2)(_trained, tmp_path / "run")
    assert (first[0], second[0]) == (0, 1)
    assert first[1:] == second[1:]
    stored = fastdynat.load_network(tmp_path / "run")[0]
    assert first[1:] == (state_digest(stored.state_dict()), 2, 2)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_group_without_cpu_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined_world("cpu", 1.0) as here:
        assert here.size == 1
    # NCCL cannot be initialised without a GPU; this is what torch says about such a group.
    known = str(dist.distributed_c10d.BackendConfig(dist.Backend("nccl")))
    assert known == "cuda:nccl"
    monkeypatch.setattr(dist, "get_backend_config", lambda: known)
    message = r"has the backend cuda:nccl, which takes no tensors on the CPU; .*cpu:gloo,cuda:nccl"
    with pytest.raises(UserError, match=message):
        join_world("cuda")
    with pytest.raises(UserError, match=message), joined_world("auto", 1.0):
        pass
    with pytest.raises(UserError, match=message):
        fastdynat.evaluate(own_net(), own_test(8), "clean")
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert fastdynat.evaluate(own_net(), own_test(8), "clean").images == 8
