"""Every loader against one slow reference: images, crops, flips, order, shards and restarts."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from support.loaders import DALI, DEVICES, LOADERS, PAD, make, random_set

from fastdynat.commands.main import main
from fastdynat.data import (
    Batch,
    ImageSet,
    ResidentLoader,
    TrainSplit,
    choose_loader,
    default_workers,
    open_train,
)
from fastdynat.data import (
    loader_choice as choose,
)
from fastdynat.data.epoch_plan import EpochSteps, plan_epoch
from fastdynat.data.imagefolder import FileSet
from fastdynat.data.loader import PlannedDraws
from fastdynat.errors import UserError
from fastdynat.machine import free_memory as room
from fastdynat.terminal.interrupts import STOPPING

JPEG_ROOT = os.environ.get("FASTDYNAT_CIFAR10_JPEG")
STREAMING = ["torch", pytest.param("dali", marks=DALI)]


def reference(
    images: ImageSet, positions: list[int], epoch: int, augment: str = "crop-flip", seed: int = 5
) -> list[list]:
    """Pixels (nested lists), label and index at each of the positions, one pixel at a time."""
    plan = plan_epoch(len(images), pad=PAD, seed=seed, epoch=epoch)
    out = []
    for position in positions:
        index = int(plan.order[position])
        pixels = images.images[index].tolist()
        height, width = len(pixels[0]), len(pixels[0][0])
        top, left = ((plan.shifts[:, position] - PAD) if "crop" in augment else torch.zeros(2).int()).tolist()
        mirrored = "flip" in augment and bool(plan.flips[position])
        made = [[[0] * width for _ in range(height)] for _ in pixels]
        for c, channel in enumerate(pixels):
            for y in range(height):
                for x in range(width):
                    from_y, from_x = y + top, (width - 1 - x if mirrored else x) + left
                    if 0 <= from_y < height and 0 <= from_x < width:
                        made[c][y][x] = channel[from_y][from_x]
        out.append([made, int(images.labels[index]), index])
    return out


def assert_follows_plan(batches: list[Batch], sizes: list[int], expected: list[list]) -> None:
    assert [len(batch.labels) for batch in batches] == sizes
    x, labels, indices = (
        torch.cat([getattr(b, f).cpu() for b in batches]) for f in ("x", "labels", "indices")
    )
    pixels, wanted_labels, wanted_indices = zip(*expected, strict=True)
    assert torch.equal(x, torch.tensor(pixels).float() / 255)
    assert labels.tolist() == list(wanted_labels)
    assert indices.tolist() == list(wanted_indices)


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for name in ("x", "labels", "indices"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop-flip"])
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_the_plans(loader: str, augment: str, device: str) -> None:
    images = random_set(20, (1, 6, 7) if augment == "crop" else (3, 8, 9))
    made = make(loader, images, augment=augment, device=device, channels_last=augment == "flip")
    assert made.steps_per_epoch == 3
    for epoch in (0, 3):
        batches = list(made.epoch(epoch))
        assert all(
            b.x.device.type == b.labels.device.type == b.indices.device.type == device for b in batches
        )
        layout = torch.channels_last if augment == "flip" else torch.contiguous_format
        assert all(b.x.is_contiguous(memory_format=layout) and b.x.dtype == torch.float32 for b in batches)
        assert_follows_plan(batches, [8, 8, 4], reference(images, list(range(20)), epoch, augment))


@pytest.mark.parametrize("loader", LOADERS)
def test_every_epoch_is_a_fresh_permutation_with_fresh_crops_and_flips(loader: str) -> None:
    images = ImageSet(
        torch.arange(1, 65).byte().view(64, 1, 1, 1).expand(64, 1, 9, 9).clone(), torch.arange(64)
    )
    images.images[..., 4:] //= 2  # so that a mirrored image is another one
    made = make(loader, images)
    seen = []
    for epoch in range(3):
        batches = list(made.epoch(epoch))
        indices = torch.cat([b.indices for b in batches])
        assert sorted(indices.tolist()) == list(range(64))
        seen.append(torch.cat([b.x for b in batches])[indices.argsort()])
        assert_same(list(made.epoch(epoch)), batches)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        # 1 of 98 crops with flips is the same by chance.
        assert (seen[a] == seen[b]).flatten(1).all(1).float().mean() < 0.15


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("num_images", "batch_size", "drop_last", "sizes"),
    [
        (18, 8, False, [8, 8, 2]),
        (17, 8, False, [8, 8]),
        (20, 8, True, [8, 8]),
        (3, 1, False, [1, 1, 1]),
        (8, 8, False, [8]),
    ],
)
def test_the_last_batch(
    loader: str, num_images: int, batch_size: int, drop_last: bool, sizes: list[int]
) -> None:
    images = random_set(num_images)
    made = make(loader, images, batch_size=batch_size, drop_last=drop_last)
    assert_follows_plan(list(made.epoch(1)), sizes, reference(images, list(range(sum(sizes))), 1))


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_given_up_and_begun_again(loader: str) -> None:
    images = random_set(60)
    made = make(loader, images)
    whole = list(made.epoch(2))
    for start in (0, 3):
        begun = made.epoch(1, start)
        next(begun)
        next(begun)
        del begun
        assert_same(list(made.epoch(2, start)), whole[start:])
    assert list(made.epoch(2, made.steps_per_epoch)) == []


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_keep_their_values(loader: str) -> None:
    """A batch must not lie in memory that the loader fills again."""
    made = make(loader, random_set(64))
    kept = [(batch, batch.x.clone()) for epoch in range(3) for batch in made.epoch(epoch)]
    assert all(torch.equal(batch.x, copy) for batch, copy in kept)


@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_in_the_middle_by_another_loader(loader: str) -> None:
    images = random_set(40)
    first = ResidentLoader(images, batch_size=8, augment="crop-flip", pad=PAD, seed=5, device="cpu")
    whole = list(first.epoch(4))
    made = make(loader, images)
    made.load_state_dict(first.state_dict())
    assert_same(list(made.epoch(4, 2)), whole[2:])
    assert made.state_dict()["checksum"] == first.state_dict()["checksum"]


@pytest.mark.parametrize("loader", LOADERS)
def test_the_global_random_state_is_untouched(loader: str) -> None:
    state = torch.get_rng_state()
    list(make(loader, random_set(20)).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 90), st.integers(2, 40), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_shares_of_the_ranks_partition_every_step(
    more: int, batch_size: int, ranks: int, parts: int, drop_last: bool
) -> None:
    batch_size = max(batch_size, 2 * ranks * parts)
    num_images = batch_size + more
    whole = EpochSteps(num_images, batch_size, drop_last=drop_last)
    cut = [
        EpochSteps(num_images, batch_size, drop_last=drop_last, ranks=ranks, rank=k, parts=parts)
        for k in range(ranks)
    ]
    assert {(one.count, one.num_positions) for one in cut} == {(whole.count, whole.num_positions)}
    for step in range(whole.count):
        shares = [one.share(step) for one in cut]
        taken = [range(num_images)[one.positions(step)] for one in cut]
        assert [len(positions) for positions in taken] == [share.images for share in shares]
        expected = list(range(num_images)[whole.positions(step)])
        if shares[0].replicated:
            assert len(expected) < 2 * ranks * parts
            assert all(list(positions) == expected for positions in taken)
        else:
            assert sorted(position for positions in taken for position in positions) == expected
            assert max(map(len, taken)) - min(map(len, taken)) <= 1
    left_out = num_images - whole.num_positions
    rest = num_images % batch_size
    assert left_out == (rest if drop_last or rest == 1 else 0)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("num_images", "rest"), [(32, 0), (37, 5), (34, 2)])
def test_shares_together_are_the_batch_of_one_process(loader: str, num_images: int, rest: int) -> None:
    images = random_set(num_images)
    by_rank = [list(make(loader, images, ranks=2, rank=k).epoch(1)) for k in range(2)]
    together = [_joined(parts) for parts in zip(*by_rank, strict=True)]
    sizes = [8] * 4 + [rest] * (rest > 0)
    assert_follows_plan(together, sizes, reference(images, list(range(32 + rest)), 1))


def _joined(parts: tuple[Batch, Batch]) -> Batch:
    """The global batch of two ranks' shares."""
    if parts[0].share.replicated:
        assert torch.equal(parts[0].x, parts[1].x)
        return parts[0]
    x, labels, indices = (torch.cat([getattr(part, f) for part in parts]) for f in ("x", "labels", "indices"))
    place = torch.cat([torch.tensor([*part.share.positions]) for part in parts]).argsort()
    return Batch(x[place], labels[place], indices[place])


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("loader", LOADERS)
def test_nothing_is_left_running(loader: str) -> None:
    list(make(loader, random_set(40)).epoch(0))  # pools that torch and DALI keep for good
    gc.collect()
    before = children(), threads()
    for _ in range(3):
        made = make(loader, random_set(40))
        begun = made.epoch(0)
        next(begun)
        del begun
        assert children() == before[0]
        list(made.epoch(1))
        assert children() == before[0]
        del made
    for _ in range(500):  # the threads that fed the workers end by themselves
        if threads() <= before[1]:
            break
        time.sleep(0.01)
    assert threads() <= before[1]


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_to_a_worker_that_starts_is_ignored(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """After torch set handlers that end the worker, and before it ignores signals to the whole group."""
    handlers = torch.utils.data._utils.signal_handling
    original = handlers._set_worker_signal_handlers

    def signalled() -> None:
        original()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(handlers, "_set_worker_signal_handlers", signalled)
    images = random_set(40)
    assert_same(list(make("torch", images).epoch(0)), list(make("resident", images).epoch(0)))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)


def test_a_worker_that_hangs_ends_with_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make("torch-1", random_set(40))
    read = loader._read

    def hangs(draws: PlannedDraws) -> torch.Tensor:
        if draws.positions[0] > 0:
            time.sleep(3600)
        return read(draws)

    monkeypatch.setattr(loader, "_read", hangs)
    before = children()
    begun = loader.epoch(0)
    next(begun)
    assert children() > before
    del begun
    assert children() == before


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 10, "ranks": 3, "parts": 2},
            "batch size 10 is the global one and too small for 3 processes and --grad-accum-steps 2, "
            "which need at least 2 images each; use --batch-size 12 or more",
        ),
        ({"ranks": 2, "rank": 2}, "there is no rank 2 of 2"),
        ({"batch_size": 99}, "batch size 99 must be between 1 and the number of training images, 40"),
        ({"augment": "flop"}, "unknown augmentation 'flop'"),
    ],
)
def test_bad_arguments(loader: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(loader, random_set(40), **options)


@pytest.mark.parametrize("loader", LOADERS)
def test_state_of_other_data_or_another_rest_is_refused(loader: str) -> None:
    state = make("resident", random_set(40)).state_dict()
    with pytest.raises(UserError, match="training images 40, this run has 41"):
        make(loader, random_set(41)).load_state_dict(state)
    changed = random_set(40)
    changed.images[3, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="other training data"):
        make(loader, changed).load_state_dict(state)
    state = make("resident", random_set(43)).state_dict()
    with pytest.raises(UserError, match="images per epoch 43, this run has 40"):
        make(loader, random_set(43), drop_last=True).load_state_dict(state)


@DALI
def test_a_fork_keeps_the_pipelines_of_its_parent() -> None:
    """Destroying one there would wait for threads that a fork does not have."""
    made = make("dali", random_set(40))
    next(made.epoch(0))
    child = os.fork()
    if child == 0:
        made = None  # type: ignore[assignment]
        gc.collect()
        os._exit(0)
    for _ in range(500):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process waits for threads that it does not have")
    assert status == 0
    assert len(list(made.epoch(1))) == 5


@DALI
def test_dali_has_one_epoch_at_a_time() -> None:
    """Else the older one would get the younger one's images with its own labels."""
    made = make("dali", random_set(40))
    older, younger = made.epoch(0), made.epoch(1)
    next(older)
    rest = list(younger)
    with pytest.raises(RuntimeError, match="another epoch of this loader has begun"):
        next(older)
    assert_same(list(made.epoch(1)), rest)


@DALI
def test_dali_needs_a_worker() -> None:
    with pytest.raises(UserError, match="at least 1 worker, got 0"):
        make("dali-0", random_set(40))


# Image files.


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: noise, enlarged."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8
    )
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, *, count: int = 12, size: tuple[int, int] = (24, 20), suffix: str = "jpg") -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                smooth(*size, seed=100 * label + index).save(root / split / name / f"{index:02}.{suffix}")
    return root


def opened(root: Path, **options: object) -> tuple[ImageSet, FileSet]:
    split = open_train("imagefolder", root, val_size=4, seed=0, **options)
    assert split.in_files
    images = split.train_images()
    assert split.num_bytes == images.images.numel()
    return images, split.train_files()


@pytest.mark.parametrize("loader", STREAMING)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_streamed_files_are_the_resident_images(loader: str, suffix: str, tmp_path: Path) -> None:
    images, files = opened(folder(tmp_path, suffix=suffix))
    made = make(loader, files)
    assert_same(list(made.epoch(1)), list(make("resident", images).epoch(1)))
    assert_same(list(made.epoch(1, 1)), list(make("resident", images).epoch(1))[1:])


@DALI
@pytest.mark.gpu
@needs("gpu")
def test_gpu_decoder_is_near_pillow(tmp_path: Path) -> None:
    images, files = opened(folder(tmp_path, size=(64, 48)))
    for a, b in zip(
        make("dali", files, device="cuda").epoch(1), make("resident", images).epoch(1), strict=True
    ):
        assert torch.equal(a.indices.cpu(), b.indices)
        assert (a.x.cpu() - b.x).abs().mul(255).mean() < 1
        assert (a.x.cpu() - b.x).abs().mul(255).max() < 12


@DALI
def test_dali_decodes_every_mode_as_pillow_does(tmp_path: Path) -> None:
    root = folder(tmp_path, size=(33, 41))
    kinds = [
        ("L", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
    ]
    kinds += [("RGB", "bmp"), ("RGB", "webp"), ("RGB", "ppm")]
    for index, (mode, suffix) in enumerate(kinds):
        smooth(33, 41, index).convert(mode).save(root / "train" / "ant" / f"m{index}.{suffix}")
    smooth(33, 41).save(root / "train" / "bee" / "progressive.jpg", progressive=True, subsampling=1)
    turned = Image.Exif()
    turned[0x112] = 6
    smooth(33, 41).save(root / "train" / "bee" / "turned.jpg", exif=turned)
    images, files = opened(root)
    assert_same(list(make("dali", files).epoch(0)), list(make("resident", images).epoch(0)))


@pytest.mark.parametrize(
    ("size", "image_size"), [((33, 41), 16), ((48, 31), 31), ((9, 8), 4), ((21, 14), 5), ((20, 35), 32)]
)
@pytest.mark.parametrize("loader", STREAMING)
def test_resizing_gives_the_values_of_the_store(
    loader: str, size: tuple[int, int], image_size: int, tmp_path: Path
) -> None:
    images, files = opened(folder(tmp_path, size=size, suffix="png"), image_size=image_size)
    assert_same(list(make(loader, files).epoch(0)), list(make("resident", images).epoch(0)))


@pytest.mark.parametrize("loader", STREAMING)
@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "size"])
def test_a_bad_file_is_named(loader: str, damage: str, tmp_path: Path) -> None:
    _, files = opened(folder(tmp_path))
    path = Path(os.fsdecode(files.paths[7]))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-80])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "missing":
        path.unlink()
    else:
        smooth(25, 20).save(path)
    made = make(loader, files)
    for _ in range(2):  # also after an error
        with pytest.raises(
            UserError, match=rf"{path.name}.*(pass --image-size|replace or remove the file)"
        ) as error:
            list(made.epoch(0))
        assert "\n" not in str(error.value)
    smooth(24, 20).save(path)
    assert len(list(made.epoch(0))) == made.steps_per_epoch


@pytest.mark.parametrize("loader", STREAMING)
def test_files_are_checked_on_resume_without_decoding(loader: str, tmp_path: Path) -> None:
    _, files = opened(folder(tmp_path / "a"))
    state = make(loader, files).state_dict()
    moved = (tmp_path / "a").rename(tmp_path / "b")
    _, files = opened(moved)
    make(loader, files).load_state_dict(state)
    path = Path(os.fsdecode(files.paths[3]))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="other content; restore them"):
        make(loader, files).load_state_dict(state)
    earlier = {key: value for key, value in state.items() if key != "content"}
    make(loader, files).load_state_dict(earlier)  # of a version that did not look at the content
    path.write_bytes(b"longer or shorter")
    with pytest.raises(UserError, match="other training data"):
        make(loader, files).load_state_dict(state)


@DALI
def test_dali_refuses_sixteen_bits(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((24, 20), 40_000, dtype=np.uint16))
    folder(tmp_path, suffix="png")
    for index in range(5):  # more than are held out
        deep.save(tmp_path / "train" / "ant" / f"deep{index}.png")
    _, files = opened(tmp_path)
    with pytest.raises(
        UserError, match=r"deep..png' is I;16 with more than 8 bits.*; use --loader torch, which can"
    ):
        make("dali", files)


# Choosing, and whole runs.


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without DALI."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "fastdynat.data.dali_loader", raising=False)


def test_auto_is_resident_where_the_images_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_train("imagefolder", folder(tmp_path), val_size=4, seed=0)
    monkeypatch.setattr(room, "available_memory", lambda: 4 * split.num_bytes)
    name, why = choose_loader(split, torch.device("cpu"))
    assert (name, why) == ("resident", "0.00 GiB of images fit in memory")
    monkeypatch.setattr(room, "available_memory", lambda: 4 * split.num_bytes - 1)
    name, why = choose_loader(split, torch.device("cpu"))
    assert name in ("dali", "torch")
    assert "0.00 GiB of images are more than 25% of the 0.0 GiB of memory available" in why
    # Digits are in host memory already.
    assert choose_loader(open_train("digits", None, val_size=4, seed=0), torch.device("cpu"))[0] == "resident"


@pytest.mark.usefixtures("no_dali")
def test_auto_without_dali_is_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_train("imagefolder", folder(tmp_path), val_size=4, seed=0)
    monkeypatch.setattr(room, "available_memory", lambda: 1)
    name, why = choose_loader(split, torch.device("cpu"))
    assert name == "torch"
    assert why.endswith("pip install 'fastdynat[dali]'")


def test_workers_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 1), (2, 1), (6, 5), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert default_workers() == workers


TINY = [
    "--val-size",
    "4",
    "--batch-size",
    "8",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--method",
    "madry",
    "--quiet",
]
TINY += ["--model", "small"]


def train(run: Path, *flags: object, code: int = 0) -> Path:
    workers = [] if "resident" in flags else ["--workers", "1"]
    assert main(["train", "--run-dir", str(run), *TINY, *workers, *map(str, flags)]) == code
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert all(torch.equal(left[key], right[key]) for key in left)


@DALI
def test_training_on_a_folder_is_the_same_with_every_loader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "imagefolder", "--data-dir", folder(tmp_path / "data", count=14, size=(32, 32))]
    runs = {name: train(tmp_path / name, *data, "--loader", name) for name in ("resident", "torch", "dali")}
    said = capsys.readouterr().err
    assert "loader dali, 1 thread(s): as asked" in said
    assert_same_weights(runs["resident"], runs["torch"])
    assert_same_weights(runs["resident"], runs["dali"])
    # Paused and gone on.
    parts = train(tmp_path / "parts", *data, "--loader", "dali", "--stop-after", 1)
    assert main(["train", "--resume", str(parts), "--loader", "torch"]) == 2
    assert "loader is dali in this run, not torch; start a new run" in capsys.readouterr().err
    assert main(["train", "--resume", str(parts), "--workers", "2", "--quiet"]) == 0
    assert_same_weights(runs["dali"], parts)


@DALI
def test_array_data_may_change_the_loader_on_resume(tmp_path: Path) -> None:
    flags = ["--train-size", 40, "--augment", "crop-flip"]
    whole = train(tmp_path / "whole", *flags)
    parts = train(tmp_path / "parts", *flags, "--loader", "torch", "--stop-after", 1)
    assert main(["train", "--resume", str(parts), "--loader", "dali", "--quiet"]) == 0
    assert_same_weights(whole, parts)


@pytest.mark.parametrize("loader", STREAMING)
def test_a_folder_larger_than_the_memory_is_streamed(
    loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "data", count=14, size=(32, 32))
    split = open_train("imagefolder", root, val_size=4, seed=0)
    # Room for the statistics and the validation images, but not to keep the training images at ease.
    monkeypatch.setattr(room, "available_memory", lambda: 5 * split.num_bytes // 2)
    if loader == "torch":
        monkeypatch.setattr(choose, "dali_problem", lambda: "DALI is not installed")
    flags = ["--data", "imagefolder", "--data-dir", root]
    monkeypatch.setattr(
        TrainSplit, "train_images", lambda self: pytest.fail("the training images were decoded")
    )
    run = train(tmp_path / "run", *flags)
    assert f"loader: {loader}\n" in (run / "config.yaml").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(room, "available_memory", lambda: split.num_bytes)
    with pytest.raises(UserError, match="for training images a --train-size, or --loader dali or torch"):
        split.train_images()


@pytest.mark.usefixtures("no_dali")
def test_no_dali_is_one_line_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--loader", "dali", code=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastdynat: error: --loader dali: DALI is not installed")
    assert "pip install 'fastdynat[dali]'" in lines[0]
    assert not (tmp_path / "run").exists()


def test_bad_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--workers", "-1", code=2)
    assert "workers must be >= 0, got -1" in capsys.readouterr().err


@DALI
@pytest.mark.skipif(
    JPEG_ROOT is None, reason="FASTDYNAT_CIFAR10_JPEG does not name a folder of CIFAR-10 as JPEG"
)
def test_cifar10_as_jpeg_through_dali(tmp_path: Path) -> None:
    split = open_train("imagefolder", JPEG_ROOT, val_size=1000, limit=2000, seed=0)
    images, files = split.train_images(), split.train_files()
    for a, b in zip(make("dali", files).epoch(0), make("resident", images).epoch(0), strict=True):
        assert (a.x - b.x).abs().max() <= 1 / 255
        assert torch.equal(a.indices, b.indices)
    data = [
        "--data",
        "imagefolder",
        "--data-dir",
        JPEG_ROOT,
        "--train-size",
        640,
        "--val-size",
        100,
        "--batch-size",
        64,
    ]
    run = train(tmp_path / "run", *data, "--loader", "dali")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[1]["loss"] < rows[0]["loss"]
