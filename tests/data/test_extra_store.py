"""Packing of extra images: all published forms, bad input, bounded memory, kills, and processes at once."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.extra_images import SILENT, extra_arrays, packed_npz, write_npz

from fastdynat.commands.main import main
from fastdynat.data import store_writer
from fastdynat.data.extra_store import ExtraStore, is_store
from fastdynat.data.pack_sources import PackSource, open_sources
from fastdynat.data.store_writer import pack, packed
from fastdynat.errors import UserError

COUNT = 41


def store_of(*paths: Path, out: Path, image_size: int | None = None) -> ExtraStore:
    return pack(open_sources(paths, image_size), out, image_size=image_size, display=SILENT)


def assert_holds(store: ExtraStore, images: np.ndarray, labels: np.ndarray | None) -> None:
    """The store has `images` (N, H, W, C) and `labels`."""
    everything = store.read(torch.arange(len(store)))
    assert torch.equal(everything, torch.from_numpy(images).permute(0, 3, 1, 2))
    picked = torch.tensor([len(store) - 1, 0, 0])
    assert torch.equal(store.read(picked), everything[picked])
    if labels is None:
        assert store.labels is None
    else:
        assert store.labels is not None
        assert store.labels.tolist() == labels.tolist()
        assert store.facts.classes == labels.max() + 1
    assert sum(store.verify()) == len(store)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_files(compressed: bool, channels: int, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", COUNT, channels=channels, compressed=compressed)
    assert_holds(store_of(path, out=tmp_path / "out"), *extra_arrays(COUNT, channels=channels))


def test_parts_of_a_set_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 16 * 8 * 8 * 3)  # chunks that cross the parts' ends
    folder = tmp_path / "set"
    folder.mkdir()
    counts = {"x_part1.npz": 20, "x_part2.npz": 7, "x_part10.npz": 31}
    for name, count in counts.items():
        write_npz(folder / name, count)
    expected = [np.concatenate(parts) for parts in zip(*map(extra_arrays, counts.values()), strict=True)]
    assert_holds(store_of(folder, out=tmp_path / "one"), *expected)
    parts = store_of(*(folder / name for name in counts), out=tmp_path / "two")
    assert_holds(parts, *expected)
    assert [source.name for source in parts.facts.sources] == list(counts)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", ">i4"])
def test_labels_of_every_whole_type(dtype: str, tmp_path: Path) -> None:
    images, labels = extra_arrays(COUNT)
    np.savez(tmp_path / "a.npz", image=images, label=labels.astype(dtype))
    assert_holds(store_of(tmp_path / "a.npz", out=tmp_path / "out"), images, labels)


def test_grey_images_without_a_channel_axis(tmp_path: Path) -> None:
    images, labels = extra_arrays(COUNT, channels=1)
    np.savez(tmp_path / "a.npz", image=images[..., 0], label=labels)
    assert_holds(store_of(tmp_path / "a.npz", out=tmp_path / "out"), images, labels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "count", [9, 400]
)  # strings in the memory of the reader, and strings left in the file
def test_pickles_of_carmon(protocol: int, count: int, tmp_path: Path) -> None:
    images, labels = extra_arrays(count)
    content = {
        "data": images,
        "extrapolated_targets": labels,
        "prediction_model": "wrn_28_10",
        "prediction_model_epoch": 200,
    }
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content, protocol))
    assert_holds(store_of(tmp_path / "a.pickle", out=tmp_path / "out"), images, labels)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    content = {"data": extra_arrays(9)[0], "extrapolated_targets": Evil(mark)}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=r"may run any code|cannot be read as a pickle"):
        open_sources([tmp_path / "a.pickle"], None)
    assert not mark.exists()


def test_a_pickle_that_expands_is_refused_at_once(tmp_path: Path) -> None:
    bomb: tuple = ("x",)
    for _ in range(40):
        bomb = (bomb, bomb)
    body = pickle.dumps(bomb, 2)[2:-1]
    (tmp_path / "a.pickle").write_bytes(b"\x80\x02}" + body + b"K\x01s.")  # {bomb: 1}
    with pytest.raises(UserError, match="a key is no text"):
        open_sources([tmp_path / "a.pickle"], None)


def folder_of(root: Path, names: list[str], side: int = 8) -> tuple[np.ndarray, list[str]]:
    """PNG files of `extra_arrays` in class folders; the images in the order of their paths' turns."""
    images, _ = extra_arrays(len(names), side)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(root / name / f"{number:03}.png")
    return images, names


@pytest.mark.parametrize("names", [["cat", "dog"], ["10", "2"]])
def test_image_folders(names: list[str], tmp_path: Path) -> None:
    images, _ = folder_of(tmp_path / "a", names * 4)
    store = store_of(tmp_path / "a", out=tmp_path / "out")
    assert store.facts.class_names == (*names,)
    assert store.labels is not None
    found = {
        (store.read(torch.tensor([i])).numpy().tobytes(), int(label)) for i, label in enumerate(store.labels)
    }
    assert found == {
        (images[i].transpose(2, 0, 1).tobytes(), names.index(name)) for i, name in enumerate(names * 4)
    }


def test_image_folders_are_resized_where_asked(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", ["x", "y"], side=8)
    Image.fromarray(extra_arrays(1, 20)[0][0]).save(tmp_path / "a" / "x" / "large.png")
    with pytest.raises(UserError, match="20x20 but the first image is 8x8"):
        store_of(tmp_path / "a", out=tmp_path / "out")
    assert store_of(tmp_path / "a", out=tmp_path / "out", image_size=6).facts.shape == (3, 6, 6)


def test_images_without_labels(tmp_path: Path) -> None:
    images, _ = extra_arrays(COUNT)
    np.savez(tmp_path / "a.npz", image=images)
    assert_holds(store_of(tmp_path / "a.npz", out=tmp_path / "out"), images, None)
    (tmp_path / "flat").mkdir()
    for number in range(5):
        Image.fromarray(images[number]).save(tmp_path / "flat" / f"{number}.png")
    assert_holds(store_of(tmp_path / "flat", out=tmp_path / "flat-out"), images[:5], None)


GOOD_IMAGES, GOOD_LABELS = extra_arrays(6)
BAD = {
    "keys": ({"images": GOOD_IMAGES, "label": GOOD_LABELS}, "has no array 'image'; it has images, label"),
    "floats": ({"image": GOOD_IMAGES / 255.0, "label": GOOD_LABELS}, "must be uint8 .* got float64"),
    "channels first": (
        {"image": GOOD_IMAGES.transpose(0, 3, 1, 2), "label": GOOD_LABELS},
        r"\(6, 3, 8, 8\), channels first; store images.transpose",
    ),
    "flat": ({"image": GOOD_IMAGES.reshape(6, -1), "label": GOOD_LABELS}, "must be uint8"),
    "columns": ({"image": np.asfortranarray(GOOD_IMAGES), "label": GOOD_LABELS}, "column by column"),
    "none": ({"image": GOOD_IMAGES[:0], "label": GOOD_LABELS[:0]}, "is not an image"),
    "objects": ({"image": np.array([{}] * 6), "label": GOOD_LABELS}, "must be uint8"),
    "fewer labels": ({"image": GOOD_IMAGES, "label": GOOD_LABELS[:5]}, r"whole numbers \(6,\)"),
    "one-hot": ({"image": GOOD_IMAGES, "label": np.eye(10)[GOOD_LABELS]}, "whole numbers"),
    "float labels": ({"image": GOOD_IMAGES, "label": GOOD_LABELS * 1.0}, "whole numbers"),
    "negative": ({"image": GOOD_IMAGES, "label": np.array([0, 1, -1, 2, 3, 4])}, "label -1 at index 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_refused_and_leave_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, message = BAD[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        store_of(tmp_path / "a.npz", out=tmp_path / "out")
    assert main(["pack", str(tmp_path / "a.npz")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdynat: error: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(b"no zip at all")


@pytest.mark.parametrize("kind", ["truncated", "flipped", "other"])
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_refused_and_leave_nothing(kind: str, compressed: bool, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", 200, compressed=compressed)
    damage(path, kind)
    with pytest.raises(UserError, match=r"a\.npz is damaged"):
        store_of(path, out=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    paths = [write_npz(tmp_path / "a.npz", 4), write_npz(tmp_path / "b.npz", 4, side=9)]
    with pytest.raises(UserError, match=r"b\.npz does not belong to .*a\.npz: its shape is \(3, 9, 9\)"):
        open_sources(paths, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing.npz", "cannot read"), ("a.txt", "is not extra data"), ("empty", "0 class")],
)
def test_other_files_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_sources([tmp_path / name], None)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not a store"):
            pack(open_sources([path], None), tmp_path / "out", overwrite=overwrite, display=SILENT)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "work"


def test_a_store_of_other_images_is_replaced_only_where_asked(tmp_path: Path) -> None:
    first, second = write_npz(tmp_path / "a.npz", 4), write_npz(tmp_path / "b.npz", 5)
    store_of(first, out=tmp_path / "out")
    with pytest.raises(UserError, match="store of other images"):
        store_of(second, out=tmp_path / "out")
    held = ExtraStore(tmp_path / "out")
    store = pack(open_sources([second], None), tmp_path / "out", overwrite=True, display=SILENT)
    assert_holds(store, *extra_arrays(5))
    assert torch.equal(held.read(torch.arange(4)).permute(0, 2, 3, 1), torch.from_numpy(extra_arrays(4)[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "out"]


def check_any_source(source: PackSource) -> None:
    """Every source will do."""


def test_a_source_is_packed_once_beside_it(tmp_path: Path, messages: list[str]) -> None:
    path = write_npz(tmp_path / "a.npz", 4)
    store = packed(path, None, SILENT, check_any_source)
    assert store.folder == tmp_path / "a.npz.packed"
    assert [text for text in messages if "packing" in text] == [
        f"packing {path} into {store.folder}, which later runs use"
    ]
    written = (store.folder / "images.npy").stat().st_mtime_ns
    os.utime(path, ns=(1, 1))  # a copy with another time and the same content
    assert packed(path, None, SILENT, check_any_source).folder == store.folder
    assert (store.folder / "images.npy").stat().st_mtime_ns == written
    write_npz(path, 5)
    assert len(packed(path, None, SILENT, check_any_source)) == 5
    path.unlink()
    assert len(packed(path, None, SILENT, check_any_source)) == 5
    assert len(packed(store.folder, None, SILENT, check_any_source)) == 5


def write_bitmaps(folder: Path, shift: int) -> np.ndarray:
    """Uncompressed images in two class folders in turn, so always of one size; uint8 (6, 8, 8, 3)."""
    images = (extra_arrays(6)[0].astype(int) + shift).astype(np.uint8)
    for number, pixels in enumerate(images):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number}.bmp")
    return images


def test_other_images_of_the_same_names_and_sizes_are_packed_again(
    tmp_path: Path, messages: list[str]
) -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])
    first, folder = write_bitmaps(tmp_path / "gen", 0), tmp_path / "gen"
    assert_holds(packed(folder, None, SILENT, check_any_source), first, labels)
    one = folder / "b" / "1.bmp"
    about, size = one.stat(), one.stat().st_size
    Image.fromarray(255 - first[1]).save(one)
    os.utime(one, ns=(about.st_mtime_ns - 1, about.st_mtime_ns - 1))  # not the newest file
    assert one.stat().st_size == size
    changed = np.concatenate([first[:1], 255 - first[1:2], first[2:]])
    with pytest.raises(UserError, match="store of other images"):
        store_of(folder, out=tmp_path / "gen.packed")
    assert_holds(packed(folder, None, SILENT, check_any_source), changed, labels)

    count = sum("packing" in text for text in messages)
    for path in folder.glob("*/*.bmp"):  # a copy with other times and the same content
        os.utime(path, ns=(1, 1))
    assert_holds(packed(folder, None, SILENT, check_any_source), changed, labels)
    assert sum("packing" in text for text in messages) == count


def test_the_command_packs_again_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, command = write_bitmaps(tmp_path / "gen", 0), ["pack", str(tmp_path / "gen"), "--quiet"]
    assert main(command) == 0
    written = tmp_path / "gen.packed" / "images.npy"
    damaged = bytearray(written.read_bytes())
    damaged[-1] ^= 1
    written.write_bytes(damaged)
    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 0
    assert_holds(ExtraStore(tmp_path / "gen.packed"), images, np.array([0, 1, 0, 1, 0, 1]))

    out = ["--out", str(tmp_path / "out")]
    for size in ("16", "4"):
        sized = [*command, *out, "--image-size", size]
        assert main(sized) == (0 if size == "16" else 2)
        assert main([*sized, "--overwrite"]) == 0
        assert ExtraStore(tmp_path / "out").facts.shape == (3, int(size), int(size))
    assert "is a store of other images" in capsys.readouterr().err


def test_a_source_in_a_folder_that_is_not_ours_is_packed_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_npz(tmp_path / "data" / "a.npz", 4) if (tmp_path / "data").mkdir() is None else tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store_writer.os, "access", lambda place, mode: place != tmp_path / "data")
    store = packed(path, None, SILENT, check_any_source)
    assert store.folder.is_relative_to(tmp_path / "cache" / "fastdynat" / "extra")
    assert packed(path, None, SILENT, check_any_source).folder == store.folder
    assert [entry.name for entry in path.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "checksums.npy", "store.json"])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_store_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    folder = packed_npz(tmp_path, COUNT).folder
    if kind == "missing":
        (folder / name).unlink()
    else:
        damage(folder / name, kind)
    with pytest.raises(UserError, match=r"is damaged or was changed|cannot read|not JSON|damaged or edited"):
        ExtraStore(folder)


def test_pack_verifies_all_pixels_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 8 * 8 * 3)  # 41 chunks, of which opening looks at 8
    store = packed_npz(tmp_path, COUNT)
    assert main(["pack", str(store.folder)]) == 0
    assert f"41 images 3x8x8, labels below 10, checksum {store.facts.checksum}" in capsys.readouterr().out
    path = store.folder / "images.npy"
    data = bytearray(path.read_bytes())
    data[-8 * 8 * 3 - 5] ^= 255  # the last image but one
    path.write_bytes(data)
    ExtraStore(store.folder)
    assert main(["pack", str(store.folder)]) == 2
    assert "images.npy from image 39 on is damaged" in capsys.readouterr().err


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz(tmp_path / "a.npz", COUNT)
    usage = store_writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda folder: usage._replace(free=COUNT * 192))
    with pytest.raises(UserError, match=r"takes 0\.0 GiB, but 0\.0 GiB are free"):
        store_of(path, out=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


MEMORY = """
import sys
from pathlib import Path
import torch
from rich.console import Console
from fastdynat.data.pack_sources import open_sources
from fastdynat.data.store_writer import pack
from fastdynat.machine.peak_memory import PeakMemory
from fastdynat.terminal.progress import ProgressDisplay
torch.set_num_threads(1)
for form in ("stored.npz", "compressed.npz", "carmon.pickle"):
    sources = [Path(f"{part}-{form}") for part in (1, 2)]
    peak = PeakMemory(torch.device("cpu"))
    pack(open_sources(sources, None), Path(form).with_suffix(""), display=ProgressDisplay(Console()))
    print(peak.bytes() if peak.exact else 0)
"""


def test_the_memory_of_packing_is_bounded(tmp_path: Path) -> None:
    """Two files of 48 MiB each are packed in a fraction of that (30 MB when this was written)."""
    images = np.zeros((16_384, 32, 32, 3), dtype=np.uint8)
    images[:, :, :, 0] = np.arange(16_384)[:, None, None] % 251
    labels = np.arange(16_384) % 10
    for part in (1, 2):
        np.savez(tmp_path / f"{part}-stored.npz", image=images, label=labels)
        np.savez_compressed(tmp_path / f"{part}-compressed.npz", image=images, label=labels)
        content = {"data": images, "extrapolated_targets": labels}
        (tmp_path / f"{part}-carmon.pickle").write_bytes(pickle.dumps(content))
    code = [sys.executable, "-c", MEMORY]
    done = subprocess.run(code, check=True, capture_output=True, text=True, cwd=tmp_path)
    peaks = [int(word) for word in done.stdout.split()]
    assert len(peaks) == 3
    assert max(peaks) < 48 * 2**20
    found = [ExtraStore(tmp_path / form) for form in ("stored", "compressed", "carmon")]
    assert {store.facts.checksum for store in found} == {found[0].facts.checksum}
    assert len(found[0]) == 32_768
    picked = found[0].read(torch.tensor([16_384 + 700]))[0]
    assert torch.equal(picked, torch.from_numpy(images[700]).permute(2, 0, 1))


SLOW = """
import sys, time
from pathlib import Path
from rich.console import Console
from fastdynat.data import store_writer
from fastdynat.data.pack_sources import open_sources
from fastdynat.terminal.messages import messages_shown
from fastdynat.terminal.progress import ProgressDisplay, ProgressTask
store_writer.CHUNK_BYTES = 10 * 8 * 8 * 3
before = ProgressTask.advance
def advance(task, amount):
    before(task, amount)
    print("chunk", flush=True)
    time.sleep(float(sys.argv[3]))
ProgressTask.advance = advance
console = Console(file=sys.stdout)
with messages_shown(console, "info"):
    store = store_writer.pack(
        open_sources([Path(sys.argv[1])], None), Path(sys.argv[2]), display=ProgressDisplay(console)
    )
print(store.facts.checksum, flush=True)
"""


def slow_packer(source: Path, out: Path, seconds: float) -> subprocess.Popen[str]:
    code = [sys.executable, "-c", SLOW, str(source), str(out), str(seconds)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, text=True)


def test_a_kill_leaves_no_store_and_the_next_packs_anew(tmp_path: Path) -> None:
    source, out = write_npz(tmp_path / "a.npz", COUNT), tmp_path / "out"
    with slow_packer(source, out, 30.0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "chunk\n"
        os.kill(process.pid, signal.SIGKILL)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 3  # a lock, the source, and what was begun
    assert not is_store(out)
    assert not any(is_store(path) for path in tmp_path.iterdir())
    assert_holds(store_of(source, out=out), *extra_arrays(COUNT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "out"]


def test_of_two_processes_one_packs_and_the_other_waits(tmp_path: Path) -> None:
    source, out = write_npz(tmp_path / "a.npz", COUNT), tmp_path / "out"
    processes = [slow_packer(source, out, 0.5) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    checksum = ExtraStore(out).facts.checksum
    assert [lines[-2] for lines in said] == [checksum, checksum]
    assert sorted(lines.count("chunk") for lines in said) == [0, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "out"]


def test_the_checksum_is_of_pixels_shape_and_labels(tmp_path: Path) -> None:
    images, labels = extra_arrays(8)
    variants = {
        "same": (images, labels),
        "pixel": (np.where(np.arange(8)[:, None, None, None] == 7, 255 - images, images), labels),
        "label": (images, np.roll(labels, 1)),
        "shape": (images.reshape(8, 4, 16, 3), labels),
    }
    found = {}
    for name, (pixels, numbers) in variants.items():
        np.savez(tmp_path / f"{name}.npz", image=pixels, label=numbers)
        found[name] = store_of(tmp_path / f"{name}.npz", out=tmp_path / name).facts.checksum
    np.savez_compressed(tmp_path / "again.npz", image=images, label=labels)
    assert store_of(tmp_path / "again.npz", out=tmp_path / "again").facts.checksum == found["same"]
    assert len(set(found.values())) == 4


def test_store_json_names_the_source(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", 4)
    store = store_of(path, out=tmp_path / "out")
    about = json.loads((store.folder / "store.json").read_text())
    (source,) = about["sources"]
    assert source["name"] == "a.npz"
    assert source["size"] == path.stat().st_size
    assert source["mtime_ns"] == path.stat().st_mtime_ns
    assert about["shape"] == [3, 8, 8]


def test_an_encrypted_or_strange_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", b"not an array")
    with pytest.raises(UserError, match="is damaged, or not a"):
        open_sources([tmp_path / "a.npz"], None)


def test_packing_is_interrupted_without_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_npz(tmp_path / "a.npz", COUNT)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_writer, "total_checksum", stop)
    with pytest.raises(KeyboardInterrupt):
        store_of(source, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert time.time() - source.stat().st_mtime < 600
