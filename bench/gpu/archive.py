"""The archive of results: all files of a folder, long ones cut, and marked as cut, to a size limit."""

import gzip
import io
import os
import tarfile
from pathlib import Path

LIMIT = 15_500_000  # bytes; what is taken home must be below 16 MiB
KEPT = 32_768  # bytes that are kept at either end of a log that is cut
LOGS = {".log", ".txt", ".jsonl", ".csv"}
CUT = "cut.txt"


def write_archive(folder: Path, target: Path, limit: int = LIMIT) -> list[str]:
    """Write `target`, a .tar.gz of the files in `folder`, within `limit` bytes; return the cuts in words.

    The biggest log is cut first (the oldest of equal ones), then the next; when all are cut, the biggest
    files are left out.
    """
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files = {
        name: path
        for name, path in files.items()
        if not path.is_symlink() and path.resolve() != target.resolve()
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
    cut: dict[str, str] = {}
    while True:
        data = _packed(files, cut)
        if len(data) <= limit:
            break
        shrink = [n for n in files if n not in cut and Path(n).suffix in LOGS and sizes[n] > 3 * KEPT]
        if shrink:
            name = max(shrink, key=lambda n: (sizes[n], -files[n].stat().st_mtime))
            cut[name] = f"{name}: {sizes[name] - 2 * KEPT:,} bytes cut from its middle"
            continue
        whole = [n for n in files if "not taken" not in cut.get(n, "")]
        if not whole:
            raise ValueError(f"nothing fits into {limit:,} bytes")
        name = max(whole, key=lambda n: min(sizes[n], 2 * KEPT) if n in cut else sizes[n])
        cut[name] = f"{name}: not taken, {sizes[name]:,} bytes"
    temporary = target.with_name(target.name + ".new")
    temporary.write_bytes(data)
    os.replace(temporary, target)
    return list(cut.values())


def _packed(files: dict[str, Path], cut: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        if cut:
            _add(tar, CUT, ("\n".join(cut.values()) + "\n").encode())
        for name, path in files.items():
            if name not in cut:
                tar.add(path, arcname=name, recursive=False)
            elif "not taken" not in cut[name]:
                _add(tar, name, _ends(path, cut[name]))
    return buffer.getvalue()


def _ends(path: Path, word: str) -> bytes:
    with path.open("rb") as file:
        head = file.read(KEPT)
        file.seek(-KEPT, os.SEEK_END)
        return head + f"\n[{word}]\n".encode() + file.read()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def split_file(path: Path, folder: Path, limit: int = LIMIT) -> list[Path]:
    """Copy `path` to `folder` as NAME.0, NAME.1, ... of at most `limit` bytes; `cat NAME.*` joins them."""
    pieces = []
    with path.open("rb") as file:
        while data := file.read(limit):
            pieces.append(folder / f"{path.name}.{len(pieces)}")
            pieces[-1].write_bytes(data)
    return pieces
