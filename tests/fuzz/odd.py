"""Values and texts that break readers which trust them."""

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
DEEP_JSON, DEEP_YAML = "[" * 100_000, "lr: " + "[" * 1000

# JSON to put in place of any value.
JSON_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        10**6,
        10**12,
        10**30,
        -(2**63),
        0.5,
        -0.5,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "a" * 300, "../../etc/passwd", "a\0b", "\ud800", "0" * 64, "é", "8/255", "nan", "[bold]x[/]"),
    *(
        [],
        [1],
        [[1]],
        ["x"],
        [None],
        [1e400, 1],
        {},
        {"a": 1},
        {"": {}},
        [0] * 3,
        [1, 32, 32],
        [3, 10**6, 10**6],
        [1, 4096, 4096],
        [-1, 2, 3],
    ),
    json.loads("[" * 90 + "]" * 90),
]

# Text for after `key:` in YAML, and after `--set m.key=`.
YAML_VALUES = [
    *(
        "",
        "no",
        "yes",
        "off",
        "on",
        "true",
        "null",
        "~",
        "auto",
        "0",
        "-1",
        "1",
        "3",
        "2.5",
        "-0.0",
        "1e-4",
        "1e23",
        "1e400",
    ),
    *(
        "nan",
        ".nan",
        ".inf",
        "-.inf",
        "0x_",
        "0x10",
        "010",
        "1_000",
        "1:30",
        "2026-13-45",
        "2026-11-28",
        "!!int x",
        "!!float {}",
    ),
    *(
        "9" * 400,
        "9" * 5000,
        "[" * 1000,
        "{" * 500,
        "]",
        "[1, 2",
        "{a: 1}",
        "[]",
        "[0.5, 0.75]",
        "[x]",
        "'",
        '"\\ud800"',
        "*x",
    ),
    *(
        "&x [*x]",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2026",
        "!!python/object/apply:os.system [touch canary]",
        "|",
        "a: b",
    ),
    *(
        "8/255",
        "8/0",
        "x" * 300,
        "é",
        '"a\\0b"',
        "@",
        "%x",
        "- 1",
        "99999999999999999999",
        "!!str [1]",
        "!!null x",
        "\t1",
        "1e5",
    ),
]

# Whole texts in place of a document.
TEXTS = [
    *(
        "",
        "\0",
        "{",
        "}",
        "[]",
        "{}",
        "null",
        "1",
        '"x"',
        "NaN",
        "[[[",
        '{"format": 1}',
        '{"a": 1, "a": 2}',
        DEEP_JSON,
        DEEP_YAML,
    ),
    *(
        BOMB,
        "a: &a [*a]",
        "a: 1\na: 2\n",
        "- a\n- b\n",
        "\ufefflr: 0.1\n",
        "%YAML 9.9\n---\n",
        "---\n---\n",
        "? [1]\n: 2\n",
    ),
    *(
        "x" * 70_000,
        "<!DOCTYPE html><html></html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ),
    *(
        '{"x":' * 40_000,
        "9" * 10_000,
        "\n" * 5000,
        "a:\n" * 100,
        "lr: 0.1\r\nseed: 2\r\n",
        "!!python/name:os.system",
    ),
]

BYTES = [
    b"\xff\xfe",
    b"\x80\x04.",
    b"caf\xe9: 1\n",
    b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n",
    b"\x00" * 4096,
    b"\xff" * 8,
    bytes(range(256)),
]

contents = st.one_of(
    st.sampled_from(TEXTS).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(BYTES),
    st.binary(max_size=64),
)


# Names of files and folders.
NAMES = [
    *(
        "a\nb",
        "a\x1b[31mb",
        "caf\udce9",
        "$x_{$",
        "[bold]x",
        "<b>&amp",
        "{{x}}",
        "%s",
        "a b",
        "'\"",
        "\u202eb",
        "😀",
        "x:y",
    ),
    *("-x", "~", "a\\b", "é" * 120, "#", "CON"),
]
SIZES = [(1, 1), (1, 3000), (3000, 1), (32, 32), (31, 32), (9000, 9000)]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F"]


def replace_kind(path: Path, kind: str) -> None:
    """Put something else where `path` is: nothing, a folder, a pipe, a link to itself, ..."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(path.name + ".away"))
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind == "file":
        path.write_text("x")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 38)


KINDS = ("nothing", "folder", "full folder", "file", "pipe", "loop", "dangling", "zero", "null", "sparse")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document, outermost first; of a long list only the first entries."""
    found = [at]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:3]):
            found += places(inner, (*at, index))
    return found


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at the path `at`; without that key where `new` is Ellipsis."""
    if not at:
        return None if new is ... else new
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value
