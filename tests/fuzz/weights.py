"""Files for `eval --weights`: mutated pickles, safetensors with any header, files that are no weights."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from fuzz import odd
from fuzz.harness import Case

Draw = st.DrawFn
NET = """
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
"""
REAL = {"1.weight": torch.zeros(10, 1024), "1.bias": torch.zeros(10)}


class Runs:
    """Pickled, it writes a canary where it is opened without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch $FUZZ_CANARY",)


def _objects() -> dict[str, Any]:
    quantized = torch.quantize_per_tensor(torch.zeros(10), 0.1, 0, torch.qint8)
    shared: Any = ()
    for _ in range(40):
        shared = (shared, shared)
    shared_lists: Any = []
    for _ in range(40):
        shared_lists = [shared_lists, shared_lists]
    itself: list[Any] = []
    itself.append(itself)
    return {
        "good": REAL,
        "code": Runs(),
        "code inside": {"state_dict": REAL, "hook": Runs()},
        "module": torch.nn.Linear(2, 2),
        "list": [1, 2],
        "text": "x",
        "none": None,
        "number": 10**400,
        "empty": {},
        "deep": json.loads("[" * 200 + "]" * 200),
        "shared": [shared],
        "shared lists": [shared_lists],
        "shared in names": {"state_dict": REAL, "names": [shared]},
        "within itself": itself,
        "integer keys": {1: torch.zeros(1)},
        "holder is a list": {"state_dict": [1]},
        "other shapes": {"1.weight": torch.zeros(3), "1.bias": torch.zeros(10)},
        "expanded": {"1.weight": torch.zeros(1).expand(10**12), "1.bias": torch.zeros(10)},
        "sparse": {"1.weight": torch.zeros(10, 1024).to_sparse(), "1.bias": torch.zeros(10)},
        "quantized": {"1.weight": torch.zeros(10, 1024), "1.bias": quantized},
        "meta": {"1.weight": torch.zeros(10, 1024, device="meta"), "1.bias": torch.zeros(10)},
        "complex": {"1.weight": torch.zeros(10, 1024, dtype=torch.complex64), "1.bias": torch.zeros(10)},
        "integers": {"1.weight": torch.zeros(10, 1024, dtype=torch.int8), "1.bias": torch.zeros(10)},
        "nan": {"1.weight": torch.full((10, 1024), float("nan")), "1.bias": torch.zeros(10)},
        "odd names": {"a\0b": torch.zeros(1), "\ud800": torch.zeros(1), "x" * 10_000: torch.zeros(1)},
    }


OBJECTS = list(_objects())
HEADERS: list[Any] = [
    *(
        {},
        [],
        None,
        "x",
        {"__metadata__": {"format": "pt"}},
        {"__metadata__": 1},
        {"1.bias": 1},
        {"1.bias": {"dtype": "F32"}},
    ),
    *(
        {"1.bias": {"dtype": kind, "shape": [10], "data_offsets": [0, 40]}}
        for kind in ("F32", "F4", "X", "BF16", 1, None, "C64")
    ),
    *(
        {"1.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, 40]}}
        for shape in ([-1], [10**12], "x", [[10]], [], [2, 5])
    ),
    *(
        {"1.bias": {"dtype": "F32", "shape": [10], "data_offsets": at}}
        for at in ([0, 10**15], [40, 0], [0], [-4, 36], [0, 39], "x")
    ),
]


@st.composite
def weights(draw: Draw, base: Path) -> Case:
    """A file for `eval --weights`: a mutated pickle, safetensors with any header, or no weights at all."""
    how = draw(st.sampled_from(("object", "raw pickle", "flip", "cut", "header", "content", "kind")))
    name = draw(st.sampled_from(OBJECTS))
    legacy, place, bit = draw(st.booleans()), draw(st.floats(0, 1)), draw(st.integers(0, 7))
    header, length = draw(st.sampled_from(HEADERS)), draw(st.sampled_from((None, None, 0, 2**63, 2**31)))
    content, kind = draw(odd.contents), draw(st.sampled_from(odd.KINDS))
    suffix = (
        draw(st.sampled_from((".pt", ".pth", "", ".safetensors"))) if how in ("content", "kind") else ".pt"
    )
    suffix = ".safetensors" if how == "header" else suffix

    def prepare(work: Path) -> list[str]:
        path = work / f"w{suffix}"
        (work / "net.py").write_text(NET)
        if how == "raw pickle":
            path.write_bytes(_raw(name))
        elif how in ("object", "flip", "cut"):
            value = _objects()[name if how == "object" else "good"]
            torch.save(value, path, _use_new_zipfile_serialization=not legacy)
            data = path.read_bytes()
            # Where the pickle is, not in the tensors.
            at = int(place * (min(len(data), 1200) - 1))
            if how == "flip":
                path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            if how == "cut":
                path.write_bytes(data[: int(place * (len(data) - 1))])
        elif how == "header":
            text = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(40))
        else:
            path.write_bytes(content)
            if how == "kind":
                odd.replace_kind(path, kind)
        return [
            *[
                "eval",
                "net.py:make",
                "--data",
                "digits",
                "--num-images",
                "8",
                "--attacks",
                "clean",
                "--weights",
            ],
            path.name,
        ]

    return Case(
        "weights",
        f"{how} {name} legacy={legacy} {place} {bit} {str(header)[:80]} {length} {content[:40]!r} {kind}",
        prepare,
    )


def _raw(name: str) -> bytes:
    try:
        data = pickle.dumps(_objects()[name], protocol=2)
        if name == "shared":  # as a key of a dictionary, which hashes it
            return data[:2] + b"}" + data[2:-1] + b"]s."
        return data
    except (pickle.PicklingError, NotImplementedError, AttributeError, TypeError):
        return pickle.dumps(name)
