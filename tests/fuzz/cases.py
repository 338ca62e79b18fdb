"""What is tried, as hypothesis strategies of `Case`."""

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from fastdynat.config import GROUPS, TrainConfig, to_flat
from fastdynat.methods import METHODS
from fastdynat.runs.manifest import write_manifest
from fuzz import odd
from fuzz.harness import Case

TINY = [
    "--train-size",
    "40",
    "--val-size",
    "20",
    "--batch-size",
    "20",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--quiet",
    "--model",
    "small",
]
Draw = st.DrawFn
COMMANDS: list[list[str]] = [
    ["train", "--resume", "run"],
    ["train", "--resume", "run", "--epochs", "3"],
    ["eval", "run", "--attacks", "clean,fgsm", "--num-images", "20"],
    ["eval", "run", "--attacks", "clean,fgsm", "--num-images", "20", "--checkpoints", "last", "--cache", "off"],
    ["report", "run", "--no-attacks", "--out", "rep"],
    ["export", "run", "--out", "Me2026Fast.pt"],
    ["boundary", "run", "--chart", "s.svg"],
    ["train", "--method", "rslad", "--guide-from", "run", *TINY],
    ["eval", "run/best/model.safetensors"],
    ["train", *TINY, "--run-dir", "run", "--overwrite"],
]


def _entries(folder: Path) -> list[str]:
    """The names of everything in the base's run, but its lock, sorted."""
    return sorted(str(p.relative_to(folder)) for p in (folder / "run").rglob("*") if p.name != ".lock")


@st.composite
def damaged_runs(draw: Draw, base: Path) -> Case:
    """A run with one entry damaged, its digests made to fit or not, under one of the commands that read it."""
    name = draw(st.sampled_from(_entries(base)))
    others = ("kind", "content", "cut", "flip")
    how = draw(st.sampled_from((*others, *("json", "yaml") * (4 if Path(name).suffix in (".json", ".jsonl", ".yaml") else 0))))
    argv, fit = list(draw(st.sampled_from(COMMANDS))), draw(st.booleans())
    damage, label = draw(_damage(base / name, how))

    def prepare(work: Path) -> list[str]:
        damage(work / name)
        if fit:
            _make_fit(work / name)
        return argv

    return Case("runs", f"{name} {label}{', digests made to fit' if fit else ''}", prepare)


@st.composite
def _damage(draw: Draw, path: Path, how: str) -> tuple[Callable[[Path], None], str]:
    """A way to damage the file `path`, of the kind `how` where it can be."""
    if how == "kind" or path.is_dir():
        kind = draw(st.sampled_from(odd.KINDS))
        return (lambda p: odd.replace_kind(p, kind)), f"becomes {kind}"
    data = path.read_bytes()
    if how in ("json", "yaml") and path.suffix in (".json", ".jsonl"):
        first = data.decode().splitlines()[0] if path.suffix == ".jsonl" else data.decode()
        at = draw(st.sampled_from(odd.places(json.loads(first))))
        new = draw(st.sampled_from([..., *odd.JSON_VALUES]))
        text = json.dumps(odd.put(json.loads(first), at, new))
        rest = data[len(first) :] if path.suffix == ".jsonl" else b""
        return (lambda p: _write(p, text.encode() + rest)), f"at {at} gets {str(new)[:60]!r}"
    if how in ("json", "yaml") and path.suffix == ".yaml":
        lines = data.decode().splitlines()
        line = draw(st.integers(1, len(lines) - 1))
        value = draw(st.sampled_from(odd.YAML_VALUES))
        lines[line] = f"{lines[line].partition(':')[0]}: {value}"
        return (lambda p: _write(p, "\n".join(lines).encode())), f"line {lines[line][:60]!r}"
    if how == "cut":
        length = draw(st.integers(0, max(0, len(data) - 1)))
        return (lambda p: _write(p, data[:length])), f"cut to {length}"
    if how == "flip":
        place, bit = draw(st.integers(0, max(0, min(len(data), 4000) - 1))), draw(st.integers(0, 7))
        return (lambda p: _write(p, data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])), f"bit {place}.{bit}"
    content = draw(odd.contents)
    return (lambda p: _write(p, content)), f"holds {content[:40]!r}"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _make_fit(path: Path) -> None:
    """Let sidecar and manifest of the checkpoint that `path` is in promise what is there, as an attacker would."""
    if path.parent.parent.name != "checkpoints":
        return
    sidecar = path.with_suffix(".json")
    try:
        if path.suffix == ".safetensors" and path.is_file() and path.stat().st_size < 1 << 24:
            about = json.loads(sidecar.read_text()) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            sidecar.write_text(json.dumps(about))
        if path.name != "checkpoint.json" and all(p.is_file() and p.stat().st_size < 1 << 24 for p in path.parent.iterdir()):
            write_manifest(path.parent)
    except (OSError, ValueError):
        pass


def _keys() -> list[str]:
    keys: dict[str, None] = {}
    for method in METHODS.values():
        config: Any = TrainConfig(method=method.name, options=method.options_type())
        keys |= dict.fromkeys(to_flat(config))
    return [*keys, *GROUPS, "options", "nosuch", "<<", "", "1", "null"]


KEYS = _keys()
METHOD_NAMES = list(METHODS)


@st.composite
def configurations(draw: Draw, base: Path) -> Case:
    """A --config file: odd values, odd keys, or no configuration at all; for train or compare."""
    if draw(st.integers(0, 3)) == 0:
        data = draw(odd.contents)
    else:
        pairs = draw(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(odd.YAML_VALUES)), min_size=1, max_size=3))
        data = "\n".join(f"{key}: {value}" for key, value in pairs).encode("utf-8", "surrogatepass")
    compare = draw(st.integers(0, 4)) == 0
    kind = draw(st.sampled_from(("file",) * 9 + odd.KINDS))

    def prepare(work: Path) -> list[str]:
        path = work / "c.yaml"
        path.write_bytes(data)
        if kind not in ("file",):
            odd.replace_kind(path, kind)
        own = ["--attacks", "clean", "--methods", "natural", "--out", "cmp"] if compare else ["--run-dir", "new"]
        return ["compare" if compare else "train", *TINY, *own, "--config", "c.yaml"]

    return Case("yaml", f"{kind} {data[:120]!r}", prepare)


FLAG_VALUES = [
    *("", "0", "-1", "1", "2", "0.5", "1e23", "1e400", "nan", "inf", "x", "é", "8/255", "8/0", "/", "//", "1,2", ",", "a\0b"),
    *(
        "\udc80",
        "\ud800",
        "9" * 400,
        "x" * 300,
        "x/" * 2000,
        "run",
        "run/last",
        ".",
        "..",
        "/dev/null",
        "/dev/zero",
        "nosuch.svg",
    ),
    *("on", "off", "auto", "cuda:9", "mps", "clean", "pgd0", "pgd", "cw-1", "pgd10@nosuch", "pgd99999999999999999999", "best"),
    *(
        "net.py",
        "net.py:",
        ":",
        "a:b",
        "net.py:make",
        "torchvision:nosuch",
        "timm:",
        "wrn-10-1",
        "wrn-999999999-1",
        "wrn-10-99999999",
    ),
    *("10000000000000", "imagefolder", "digits", "natural", "dyart", "--help", "--", "-", "[bold]", "1/0", "2/1", "1/3"),
]
STARTS: dict[str, list[str]] = {
    "train": ["train", *TINY, "--run-dir", "new"],
    "resume": ["train", "--resume", "run"],
    "eval": ["eval", "run", "--attacks", "clean", "--num-images", "8"],
    "report": ["report", "run", "--no-attacks"],
    "export": ["export", "run", "--out", "Me2026Fast.pt"],
    "boundary": ["boundary", "run"],
    "compare": ["compare", "--methods", "natural", *TINY, "--attacks", "clean", "--out", "cmp"],
    "recipes": ["recipes"],
}
OWN_FLAGS = {
    "eval": "attacks eps step-size norm checkpoints weights source data data-dir image-size num-images shard batch-size device "
    "amp kernels seed cache fresh checks per-class json list-attacks",
    "report": "out num-images checkpoint batch-size data-dir device seed",
    "export": "out format checkpoint dataset paper",
    "boundary": "chart",
    "compare": "methods seeds budget-seconds set attacks out json chart",
}
SLOW = {"--compile", "--awp", "--boundary-speed", "--check-fidelity"}  # what an accepted value of costs more than a moment


@st.composite
def flags(draw: Draw, base: Path) -> Case:
    """A command with one to three odd flags."""
    start = draw(st.sampled_from(sorted(STARTS)))
    known = OWN_FLAGS.get(start, "").split() or [key.replace("_", "-") for key in KEYS if key]
    argv = list(STARTS[start])
    if start == "train":
        argv += ["--method", draw(st.sampled_from(METHOD_NAMES))]
    for _ in range(draw(st.integers(1, 3))):
        flag = f"--{draw(st.sampled_from(known))}"
        if flag in SLOW:
            continue
        value = draw(st.sampled_from(FLAG_VALUES))
        argv += draw(st.sampled_from(([flag, value], [f"{flag}={value}"], [flag], [value], [flag.upper(), value])))
    return Case("flags", "", lambda work: argv)


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
    *({}, [], None, "x", {"__metadata__": {"format": "pt"}}, {"__metadata__": 1}, {"1.bias": 1}, {"1.bias": {"dtype": "F32"}}),
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
    """A file for `eval --weights`: pickles of many things, cut and flipped; safetensors of any header; no weights at all."""
    how = draw(st.sampled_from(("object", "raw pickle", "flip", "cut", "header", "content", "kind")))
    name = draw(st.sampled_from(OBJECTS))
    legacy, place, bit = draw(st.booleans()), draw(st.floats(0, 1)), draw(st.integers(0, 7))
    header, length = draw(st.sampled_from(HEADERS)), draw(st.sampled_from((None, None, 0, 2**63, 2**31)))
    content, kind = draw(odd.contents), draw(st.sampled_from(odd.KINDS))
    suffix = draw(st.sampled_from((".pt", ".pth", "", ".safetensors"))) if how in ("content", "kind") else ".pt"
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
        return [*["eval", "net.py:make", "--data", "digits", "--num-images", "8", "--attacks", "clean", "--weights"], path.name]

    return Case(
        "weights", f"{how} {name} legacy={legacy} {place} {bit} {str(header)[:80]} {length} {content[:40]!r} {kind}", prepare
    )


def _raw(name: str) -> bytes:
    try:
        return pickle.dumps(_objects()[name])
    except (pickle.PicklingError, NotImplementedError, AttributeError, TypeError):
        return pickle.dumps(name)


@st.composite
def caches(draw: Draw, base: Path) -> Case:
    """A damaged measurement, report cache, bench baseline or ledger under the command that reads it."""
    commands = {
        "run/evaluations": ["eval", "run", "--attacks", "clean,fgsm", "--num-images", "20"],
        "rep/findings.json": ["report", "run", "--no-attacks", "--num-images", "8", "--out", "rep"],
        "bench.json": [
            "bench",
            "--method",
            "natural",
            "--data",
            "digits",
            "--model",
            "small",
            "--batch-size",
            "8",
            "--baseline",
            "bench.json",
            "--repeats",
            "1",
        ],
        "cmp/ledger.json": STARTS["compare"],
    }
    which = draw(st.sampled_from(sorted(commands)))
    file = draw(st.sampled_from(sorted(base.joinpath(which).glob("*.json")))) if which == "run/evaluations" else base / which
    damage, label = draw(_damage(file, draw(st.sampled_from(("json", "json", "json", "json", "content", "kind", "cut")))))
    name = file.relative_to(base)

    def prepare(work: Path) -> list[str]:
        damage(work / name)
        return list(commands[which])

    return Case("caches", f"{name} {label}", prepare)


@st.composite
def settings_of(draw: Draw, base: Path) -> Case:
    """`compare --set METHOD.KEY=VALUE` with odd keys and values."""
    key, value = draw(st.sampled_from(KEYS)), draw(st.sampled_from(odd.YAML_VALUES))
    method = draw(st.sampled_from(("natural", "natural", "natural", "nosuch", "")))
    return Case("set", "", lambda work: [*STARTS["compare"][:-1], "cmp2", "--set", f"{method}.{key}={value}"])


@st.composite
def folders(draw: Draw, base: Path) -> Case:
    """An image folder with one odd entry, to train on and to evaluate on."""
    at = draw(
        st.sampled_from(("train/a/0.png", "train/a/z.png", "test/b/0.png", "train/a", "test", "train", "test/c", "train/z.png"))
    )
    how = draw(st.sampled_from(("content", "kind", "cut", "flip")))
    content, kind = draw(odd.contents), draw(st.sampled_from(odd.KINDS))
    place, bit = draw(st.floats(0, 1)), draw(st.integers(0, 7))
    flags = ["--train-size", "8", "--val-size", "2", "--batch-size", "4", "--steps", "1", "--epochs", "1", "--quiet"]
    loader = draw(st.sampled_from(("auto", "resident", "torch")))

    def prepare(work: Path) -> list[str]:
        path = work / "pictures" / at
        if how == "kind" or path.is_dir():
            odd.replace_kind(path, kind)
        elif how == "content" or not path.exists():
            path.write_bytes(content) if path.parent.is_dir() else path.parent.mkdir(parents=True)
        else:
            data = path.read_bytes()
            where = int(place * (len(data) - 1))
            new = data[:where] if how == "cut" else data[:where] + bytes([data[where] ^ (1 << bit)]) + data[where + 1 :]
            path.write_bytes(new)
        data_flags = ["--data", "imagefolder", "--data-dir", "pictures", "--loader", loader, "--workers", "0"]
        return ["train", *data_flags, "--model", "small", "--method", "natural", "--run-dir", "new", *flags]

    return Case("folders", f"{at} {how} {kind} {content[:40]!r} {place} {bit}", prepare)


STRATEGIES = {
    "runs": damaged_runs,
    "yaml": configurations,
    "flags": flags,
    "weights": weights,
    "caches": caches,
    "set": settings_of,
    "folders": folders,
}
# How many of a hundred inputs are of a kind: the quick ones more often.
SHARES = {"runs": 16, "yaml": 20, "flags": 20, "weights": 16, "caches": 12, "set": 10, "folders": 6}
