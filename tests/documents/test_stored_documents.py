"""The reader of every document: limits, schemas, and what its messages say."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from fastdynat.documents import (
    DocumentError,
    check_text,
    convert,
    files,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    read_yaml_value,
    regular_file,
    short_repr,
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    count: Annotated[int, msgspec.Meta(ge=1, le=100)]
    shape: tuple[int, int]
    rate: Annotated[float, msgspec.Meta(ge=0)] | None = None


GOOD = {"format": "thing/1", "count": 2, "shape": [3, 4], "rate": 1, "unknown": {"more": []}}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def read(path: Path) -> Thing:
    return read_json(path, Thing, what="a thing", format="thing/1", remedy="make another")


def test_a_good_document_with_unknown_keys(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", GOOD)) == Thing(count=2, shape=(3, 4), rate=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "count must be int, got bool"),
        ({"count": 0}, "count must be int >= 1"),
        ({"count": 10**12}, "count must be int <= 100"),
        ({"count": None}, "count must be int, got null"),
        ({"shape": [1]}, "shape must be a list of length 2, got 1"),
        ({"shape": [1, "2"]}, "shape[1] must be int, got str"),
        ({"rate": "1"}, "rate must be float | null, got str"),
        ({"rate": float("nan")}, "rate must be float >= 0.0"),
        ({"rate": 10**400}, "rate Number out of range"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.json", GOOD | change)
    with pytest.raises(DocumentError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: {message}: it was damaged or edited; make another"


def test_other_documents(tmp_path: Path) -> None:
    def refusal(text: str) -> str:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DocumentError) as caught:
            read(tmp_path / "a.json")
        return str(caught.value).removeprefix(str(tmp_path / "a.json"))

    assert refusal(json.dumps(GOOD)[:-9]) == " is not JSON: it is truncated or not a thing; make another"
    assert refusal("[" * 100_000) == " is not JSON: it is truncated or not a thing; make another"
    assert refusal("[]") == " is not a thing (its format is not thing/1); make another"
    assert (
        refusal('{"format": "thing/1", "count": 1}')
        == " lacks 'shape': it was damaged or edited; make another"
    )
    deep = json.dumps(GOOD)[:-1] + ', "more": ' + "[" * 200 + "]" * 200 + "}"
    assert refusal(deep) == " is nested more than 64 deep, more than any such file is; make another"
    assert refusal('{"count": ' + "9" * 5000) == " is not JSON: it is truncated or not a thing; make another"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "secret").write_text("{}")
    for path, message in [
        (tmp_path, "it is a folder, not a file"),
        (tmp_path / "pipe", "it is a pipe, not a file"),
        (Path("/dev/zero"), "it is a device, not a file"),
        (tmp_path / "nowhere", "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "secret" / "a.json", "Not a directory"),
        (tmp_path / "latin", "is not a text file in UTF-8 (byte 3)"),
        (Path("a\0b"), "the path has a NUL character"),
        (Path("a\ud800b"), "the path is not valid text"),
    ]:
        with pytest.raises(DocumentError, match=r"; make another|path ") as caught:
            read(path)
        assert message in str(caught.value)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DocumentError, match="has more than 2 KiB"):
        read_bytes(tmp_path / "sparse", limit=2048)
    assert regular_file(tmp_path / "sparse") == 1 << 40
    (tmp_path / "exact").write_bytes(b"x" * 2048)
    assert read_bytes(tmp_path / "exact", limit=2048) == b"x" * 2048


def test_pipes_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with pytest.raises(DocumentError, match="nothing came through this pipe"):
        read_yaml_value(tmp_path / "pipe")
    with pytest.raises(DocumentError, match="/dev/zero has more than 256 KiB"):
        read_yaml_value(Path("/dev/zero"))
    monkeypatch.setattr(files, "PATIENCE", 10)
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("epochs: 3"))
    writer.start()
    assert read_yaml_value(tmp_path / "pipe") == {"epochs": 3}
    writer.join()


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"epoch": 1, "loss": NaN}\n\n{"epoch": 2}\n')
    assert [row["epoch"] for row in read_json_lines(path, dict[str, Any], what="rows")] == [1, 2]
    path.write_text('{"epoch": 1}\n{"ep')
    with pytest.raises(DocumentError, match="line 2 is not JSON: it is truncated or not rows"):
        read_json_lines(path, dict[str, Any], what="rows")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfepochs: 3\n")
    assert read_text(tmp_path / "a", limit=99) == "epochs: 3\n"
    assert read_yaml_value(tmp_path / "a") == {"epochs": 3}


def test_values_that_are_not_plain() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(DocumentError, match="nested more than 64 deep"):
        convert(loop, list[Any], origin="state")
    with pytest.raises(DocumentError, match="state"):
        convert({"count": object(), "shape": (1, 2)}, Thing, origin="state")
    assert parse_json("[1]", list[int], origin="x", what="numbers") == [1]


def test_text_of_names() -> None:
    assert check_text("caf\xe9\udc80", "a name") == "caf\xe9\udc80"  # bytes of a path that are no UTF-8
    assert len(short_repr("x" * 1000)) == 60
    assert short_repr(10**5000) == "a int"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method: no", "no"),
        ("amp: off", "off"),
        ("run_dir: 2026-11-28", "2026-11-28"),
        ("lr: 2026-13-45", "2026-13-45"),
        ("epochs: 010", "010"),
        ("epochs: 1:30", "1:30"),
        ("train_size: 1_000", 1000),
        ("lr: 1e-4", "1e-4"),
        ("lr: 1.0e-4", 1e-4),
        ("lr: -.inf", -float("inf")),
        ("nesterov: true", True),
        ("warmup: ~", None),
        ("milestones: [0.5, 0.75]", [0.5, 0.75]),
        ("m: &m [0.5]\nn: *m", [0.5]),
    ],
)
def test_what_yaml_means(text: str, value: object) -> None:
    assert next(iter(parse_yaml(text, origin="f").values())) == value


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nbeta: 2\nlr: 3", "'lr' is given twice, on lines 1 and 3, line 3"),
        ("{lr: 1, lr: 1}", "'lr' is given twice, on one line, line 1"),
        ("lr: 0x_", "this is no !!int, line 1"),
        ("lr: !!int x", "this is no !!int, line 1"),
        ("lr: !!timestamp x", "this is no !!timestamp"),
        ("lr: " + "9" * 5000, "this is no !!int"),
        ("lr: " + "[" * 1000, "nested more than 16 deep, line 1"),
        ("lr: " + "[" * 100_000, "nested more than 16 deep, line 1"),
        ("? " * 5000, "nested more than 16 deep"),
        (BOMB, "more than 20000 values, aliases counted in full, line 5"),
        ("a: &a [*a]", "an alias stands inside of what it is an alias of"),
        ("? [1]\n: 2", "a key must be a name"),
        (
            "a: !!python/object/apply:os.system ['touch canary']",
            "could not determine a constructor for the tag",
        ),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_yaml_that_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DocumentError) as caught:
        parse_yaml(text, origin="f.yaml")
    assert str(caught.value).startswith("f.yaml is not valid YAML: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
