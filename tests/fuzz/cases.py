"""Damaged and odd inputs, as Hypothesis strategies of `Case`."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from fastdynat.config import GROUPS, TrainConfig, to_flat
from fastdynat.methods import METHODS
from fastdynat.runs.manifest import write_manifest
from fuzz import odd
from fuzz.commands import BENCH, COMMANDS, OWN_FLAGS, SLOW, STARTS, TINY
from fuzz.harness import Case
from fuzz.weights import Draw, weights


def _entries(folder: Path) -> list[str]:
    """The names of everything in the base's run, but its lock, sorted."""
    return sorted(str(p.relative_to(folder)) for p in (folder / "run").rglob("*") if p.name != ".lock")


@st.composite
def damaged_runs(draw: Draw, base: Path) -> Case:
    """A run with one damaged entry, digests adjusted or not, under one of the commands that read it."""
    name = draw(st.sampled_from(_entries(base)))
    others = ("kind", "content", "cut", "flip", "twice")
    how = draw(
        st.sampled_from(
            (*others, *("json", "yaml") * (4 if Path(name).suffix in (".json", ".jsonl", ".yaml") else 0))
        )
    )
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
    if how == "twice":
        return (lambda p: _write(p, data + data)), "stands twice"
    if how == "cut":
        length = draw(st.integers(0, max(0, len(data) - 1)))
        return (lambda p: _write(p, data[:length])), f"cut to {length}"
    if how == "flip":
        place, bit = draw(st.integers(0, max(0, min(len(data), 4000) - 1))), draw(st.integers(0, 7))
        return (
            lambda p: _write(p, data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        ), f"bit {place}.{bit}"
    content = draw(odd.contents)
    return (lambda p: _write(p, content)), f"holds {content[:40]!r}"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _make_fit(path: Path) -> None:
    """Adjust sidecar and manifest of the checkpoint around `path` to its content, as an attacker would."""
    if path.parent.parent.name != "checkpoints":
        return
    sidecar = path.with_suffix(".json")
    try:
        if path.suffix == ".safetensors" and path.is_file() and path.stat().st_size < 1 << 24:
            about = json.loads(sidecar.read_text()) | {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
            }
            sidecar.write_text(json.dumps(about))
        if path.name != "checkpoint.json" and all(
            p.is_file() and p.stat().st_size < 1 << 24 for p in path.parent.iterdir()
        ):
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
        pairs = draw(
            st.lists(
                st.tuples(st.sampled_from(KEYS), st.sampled_from(odd.YAML_VALUES)), min_size=1, max_size=3
            )
        )
        data = "\n".join(f"{key}: {value}" for key, value in pairs).encode("utf-8", "surrogatepass")
    compare = draw(st.integers(0, 4)) == 0
    kind = draw(st.sampled_from(("file",) * 9 + odd.KINDS))

    def prepare(work: Path) -> list[str]:
        path = work / "c.yaml"
        path.write_bytes(data)
        if kind not in ("file",):
            odd.replace_kind(path, kind)
        own = (
            ["--attacks", "clean", "--methods", "natural", "--out", "cmp"]
            if compare
            else ["--run-dir", "new"]
        )
        return ["compare" if compare else "train", *TINY, *own, "--config", "c.yaml"]

    return Case("yaml", f"{kind} {data[:120]!r}", prepare)


FLAG_VALUES = [
    *(
        "",
        "0",
        "-1",
        "1",
        "2",
        "0.5",
        "1e23",
        "1e400",
        "nan",
        "inf",
        "x",
        "é",
        "8/255",
        "8/0",
        "/",
        "//",
        "1,2",
        ",",
        "a\0b",
    ),
    *(
        *odd.NAMES,
        *("bench.json", "cmp/ledger.json", "run/metrics.jsonl", "pictures/train/a/0.png", "rep/index.html"),
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
    *(
        "on",
        "off",
        "auto",
        "cuda:9",
        "mps",
        "clean",
        "pgd0",
        "pgd",
        "cw-1",
        "pgd10@nosuch",
        "pgd99999999999999999999",
        "best",
    ),
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
        "wrn-100000-1000",
        "wrn-994-100",
    ),
    *(
        "10000000000000",
        "imagefolder",
        "digits",
        "natural",
        "dyart",
        "--help",
        "--",
        "-",
        "[bold]",
        "1/0",
        "2/1",
        "1/3",
    ),
]


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
        argv += draw(
            st.sampled_from(([flag, value], [f"{flag}={value}"], [flag], [value], [flag.upper(), value]))
        )
    return Case("flags", "", lambda work: argv)


@st.composite
def caches(draw: Draw, base: Path) -> Case:
    """A damaged measurement, report cache, bench baseline or ledger under the command that reads it."""
    page = ["report", "run", "--no-attacks", "--num-images", "8", "--out", "rep"]
    commands = {
        "run/evaluations": ["eval", "run", "--attacks", "clean,fgsm", "--num-images", "20"],
        "rep/findings.json": page,
        "rep/.fastdynat-report.json": page,
        "rep/index.html": page,
        "bench.json": [*BENCH, "--baseline", "bench.json"],
        "cmp/ledger.json": STARTS["compare"],
    }
    which = draw(st.sampled_from(sorted(commands)))
    file = (
        draw(st.sampled_from(sorted(base.joinpath(which).glob("*.json"))))
        if which == "run/evaluations"
        else base / which
    )
    damage, label = draw(
        _damage(file, draw(st.sampled_from(("json", "json", "json", "json", "content", "kind", "cut"))))
    )
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
        st.sampled_from(
            (
                "train/a/0.png",
                "train/a/z.png",
                "test/b/0.png",
                "train/a",
                "test",
                "train",
                "test/c",
                "train/z.png",
            )
        )
    )
    how = draw(st.sampled_from(("content", "kind", "cut", "flip", "picture", "name")))
    content, kind = draw(odd.contents), draw(st.sampled_from(odd.KINDS))
    size, mode, name = (draw(st.sampled_from(values)) for values in (odd.SIZES, odd.MODES, odd.NAMES))
    place, bit = draw(st.floats(0, 1)), draw(st.integers(0, 7))
    flags = [
        "--train-size",
        "8",
        "--val-size",
        "2",
        "--batch-size",
        "4",
        "--steps",
        "1",
        "--epochs",
        "1",
        "--quiet",
    ]
    loader = draw(st.sampled_from(("auto", "resident", "torch")))

    def prepare(work: Path) -> list[str]:
        path = work / "pictures" / at
        if how == "kind" or path.is_dir():
            odd.replace_kind(path, kind)
        elif how == "picture" and path.parent.is_dir():
            Image.new(mode, size).save(path, format="TIFF" if mode == "F" else "PNG")
        elif how == "name" and path.exists():
            path.rename(path.with_name(f"{name}{path.suffix}"))
        elif how == "content" or not path.exists():
            path.write_bytes(content) if path.parent.is_dir() else path.parent.mkdir(parents=True)
        else:
            data = path.read_bytes()
            where = int(place * (len(data) - 1))
            new = (
                data[:where]
                if how == "cut"
                else data[:where] + bytes([data[where] ^ (1 << bit)]) + data[where + 1 :]
            )
            path.write_bytes(new)
        data_flags = ["--data", "imagefolder", "--data-dir", "pictures", "--loader", loader, "--workers", "0"]
        return ["train", *data_flags, "--model", "small", "--method", "natural", "--run-dir", "new", *flags]

    return Case(
        "folders", f"{at} {how} {kind} {size} {mode} {name!r} {content[:40]!r} {place} {bit}", prepare
    )


@st.composite
def names(draw: Draw, base: Path) -> Case:
    """A run directory of an odd name, where a command reads and where one writes."""
    name, start = draw(st.sampled_from(odd.NAMES)), draw(st.sampled_from(COMMANDS))
    new = draw(st.booleans())

    def prepare(work: Path) -> list[str]:
        if new:
            return ["train", *TINY, "--method", "natural", "--run-dir", name]
        (work / "run").rename(work / name)
        return [
            word.replace("run", name, 1) if word == "run" or word.startswith("run/") else word
            for word in start
        ]

    return Case("names", f"{name!r}", prepare)


ENVIRONMENTS: list[dict[str, str | None]] = [
    *(
        {name: value}
        for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR", "MPLCONFIGDIR")
        for value in ("/proc/x", "/etc/passwd", "")
    ),
    *({"COLUMNS": value} for value in ("1", "0", "-5", "x", "99999")),
    *(
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
        {"FORCE_COLOR": "1"},
        {"LC_ALL": "C", "LANG": "C"},
        {"HOME": None},
        {"PATH": None},
    ),
    *({"FASTDYNAT_KERNELS": value} for value in ("nosuch", "", "cuda")),
    *({"OMP_NUM_THREADS": "x"}, {"CUDA_VISIBLE_DEVICES": "99"}, {"TZ": "x"}, {"MPLBACKEND": "nosuch"}),
]


@st.composite
def surroundings(draw: Draw, base: Path) -> Case:
    """A command in an odd environment."""
    environment = draw(st.sampled_from(ENVIRONMENTS))
    argv = draw(
        st.sampled_from(
            [*COMMANDS, ["doctor"], ["train", *TINY, "--method", "natural", "--amp", "--run-dir", "new"]]
        )
    )
    return Case("surround", str(environment), lambda work: argv, environment)


STRATEGIES = {
    "runs": damaged_runs,
    "yaml": configurations,
    "flags": flags,
    "weights": weights,
    "caches": caches,
    "set": settings_of,
    "folders": folders,
    "names": names,
    "surround": surroundings,
}
# Inputs of each kind in a hundred: quick ones more often.
SHARES = {
    "runs": 15,
    "yaml": 18,
    "flags": 19,
    "weights": 15,
    "caches": 12,
    "set": 8,
    "folders": 6,
    "names": 4,
    "surround": 3,
}
