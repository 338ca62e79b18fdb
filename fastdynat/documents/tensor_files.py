"""Files of tensors, checked before a library opens them and read without running code."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from torch import Tensor

from fastdynat.documents import DocumentError, check_pickle, open_file, regular_file
from fastdynat.documents.pickles import MAX_BYTES
from fastdynat.errors import first_line

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
REMEDY = "give a weights file: .safetensors, or torch.save of a state_dict"


def check_safetensors(path: Path) -> None:
    """Raise DocumentError unless `path` is a file whose size is what its safetensors header says."""
    size = regular_file(path, remedy="weights are a .safetensors file")
    try:
        with open_file(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = (
                json.loads(file.read(length)) if length <= min(size - 8, MAX_HEADER) else {"": {}}
            )
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        good = 8 + length + max(ends, default=0) == size
    except (
        OSError,
        struct.error,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ):
        good = False
    if not good:
        raise DocumentError(f"{path} is damaged or was changed: it is truncated, or not a safetensors file")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the safetensors file `path`, on the CPU. Raises DocumentError where it is none."""
    check_safetensors(path)
    try:
        try:
            str(path).encode()
        except UnicodeEncodeError:  # a name that is no UTF-8, which the library does not open
            return load(path.read_bytes())
        return load_file(path)
    except Exception as error:  # offsets that overlap, types that torch lacks: each in its own way
        raise DocumentError(
            f"{path} is not a safetensors file that torch can read: {first_line(error)}"
        ) from None


def read_pickle(path: Path, *, what: str, remedy: str = REMEDY) -> Any:
    """The content of a `torch.save` file, tensors on the CPU. No code of the file runs.

    what: the content in words with its article, for messages.

    Raises:
        DocumentError: missing, a folder or a pipe, truncated, compressed, or more than tensors and plain
            values.
    """
    regular_file(path, remedy=remedy)
    _check_content(path, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles; the error below is enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The first line is torch's advice to trust the file, which is not ours.
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else first_line(error)
        raise DocumentError(f"{path} is truncated or not {what} ({reason}); {remedy}") from None
    except Exception as error:  # the restricted unpickler fails in many ways, all of which mean the same
        raise DocumentError(f"{path} is truncated or not {what} ({type(error).__name__}); {remedy}") from None


def _check_content(path: Path, what: str) -> None:
    """Refuse files that would fill the memory or never finish loading; other damage is left to torch."""
    with open_file(path) as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            check_pickle(file, str(path))
            return
    _check_members(path, what)
    try:
        # The very bytes that torch.load opens.
        record: bytes = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    except Exception:
        return
    check_pickle(io.BytesIO(record), str(path), parts=1)


def _check_members(path: Path, what: str) -> None:
    """Refuse a zip that torch.save did not write: a compressed one could fill the memory."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except Exception:  # damaged in one of many ways
        raise DocumentError(f"{path} is truncated or not {what} (a damaged zip); {REMEDY}") from None
    stored = all(
        member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
        for member in members
    )
    pickles = [member.file_size for member in members if member.filename.lower().endswith(".pkl")]
    if not stored or sum(pickles) > MAX_BYTES:
        raise DocumentError(f"{path} is not {what}: a zip that torch.save did not write")


def starts_as_a_page(path: Path) -> bool:
    """True if `path` begins like HTML, as a failed download does. Raises DocumentError as `read_pickle`."""
    with open_file(path, remedy=REMEDY) as file:
        return file.read(1) == b"<"
