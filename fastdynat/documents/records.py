"""JSON documents as typed values, by msgspec: a Python type is the schema."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fastdynat.documents.files import MIB, DocumentError, read_text

T = TypeVar("T")
DEPTH = 64  # of nested lists and objects; ours have at most 8
DAMAGED = "it was damaged or edited"
_MISSING = re.compile(r"Object missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_WRONG = re.compile(r"(.*?) - at `(key` in `)?\$\.?([^`]*)`$")


def read_json(
    path: Path,
    kind: type[T],
    *,
    what: str,
    format: str | None = None,
    remedy: str = "",
    limit: int = 64 * MIB,
) -> T:
    """The JSON document at `path` as a `kind`.

    Args:
        kind: a dataclass, a msgspec.Struct or a type such as ``dict[str, int]``; ranges are `msgspec.Meta`.
            Keys that it does not have are left out.
        what: the document in words with its article, for messages.
        format: the value of its key "format", if it has one.
        remedy: the advice in the message where it cannot be used.
        limit: the most bytes that a good file has.

    Raises:
        DocumentError: it cannot be read, is not JSON, is another document, or has a wrong or missing value.
    """
    try:
        return parse_json(read_text(path, limit=limit), kind, origin=str(path), what=what, format=format)
    except DocumentError as error:
        raise DocumentError(f"{error}; {remedy}" if remedy else str(error)) from None


def read_json_lines(
    path: Path, kind: type[T], *, what: str, remedy: str = "", limit: int = 256 * MIB
) -> list[T]:
    """The lines of the file at `path`, each a JSON document; see `read_json`."""
    try:
        lines = read_text(path, limit=limit).split("\n")
        return [
            parse_json(line, kind, origin=f"{path}, line {number}", what=what)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    except DocumentError as error:
        raise DocumentError(f"{error}; {remedy}" if remedy else str(error)) from None


def parse_json(text: str, kind: type[T], *, origin: str, what: str, format: str | None = None) -> T:
    """`text` as a `kind`; see `read_json`. `origin` is the name of the file in messages."""
    try:
        # Not msgspec's own parser: NaN and Infinity, which Python writes, are no error here.
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DocumentError(f"{origin} is not JSON: it is truncated or not {what}") from None
    if format is not None and (not isinstance(value, dict) or value.get("format") != format):
        raise DocumentError(f"{origin} is not {what} (its format is not {format})")
    return convert(value, kind, origin=origin)


def convert(value: Any, kind: type[T], *, origin: str, why: str = DAMAGED) -> T:
    """The plain `value` of a parser or of torch as a `kind`; lists become tuples where `kind` says so.

    Raises:
        DocumentError: a value is missing, of another type, out of range, or nested more than 64 deep; names
            it. `why` is the explanation in the message.
    """
    check_depth(value, origin)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise DocumentError(_in_words(str(error), origin, why)) from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # values that are not plain
        raise DocumentError(f"{origin}: {' '.join(str(error).split())}: {why}") from None


def through_json(value: Any) -> Any:
    """`value` after a JSON round trip: tuples become lists, keys text. For comparison with a stored value."""
    return json.loads(json.dumps(value))


def check_depth(value: Any, origin: str) -> None:
    """Raise DocumentError where lists and dictionaries in `value` are nested more than 64 deep."""
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, (dict, list, tuple))
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > DEPTH:
            raise DocumentError(f"{origin} is nested more than {DEPTH} deep, more than any such file is")


def _in_words(message: str, origin: str, why: str) -> str:
    if missing := _MISSING.match(message):
        inside = f" in {missing[2]}" if missing[2] else ""
        return f"{origin} lacks {missing[1]!r}{inside}: {why}"
    text, key = message, ""
    if wrong := _WRONG.match(message):
        name = wrong[3].replace("[...]", ", a value" if wrong[3] != "[...]" else "a value")
        text, key = wrong[1], f"{'a key of ' if wrong[2] else ''}{name} "
    text = (
        text.replace("`", "")
        .replace("Expected ", "must be ", 1)
        .replace("object", "a mapping")
        .replace("array", "a list")
    )
    return f"{origin}: {key}{text}: {why}"
