"""Reading of stored and given documents, with type, range, depth and size checked before use.

A document that cannot be used raises `DocumentError`, a `UserError` of one line: the file, the key, the
expected value, and the remedy. Nothing here runs code from a file, waits for a pipe without a limit, or (but
for `tensor_files`) imports torch."""

from fastdynat.documents.files import (
    DocumentError,
    check_text,
    open_file,
    read_bytes,
    read_text,
    regular_file,
    short_repr,
)
from fastdynat.documents.pickles import check_pickle
from fastdynat.documents.records import convert, parse_json, read_json, read_json_lines, through_json
from fastdynat.documents.yamls import parse_yaml, read_yaml_value

__all__ = [
    "DocumentError",
    "check_pickle",
    "check_text",
    "convert",
    "open_file",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "read_text",
    "read_yaml_value",
    "regular_file",
    "short_repr",
    "through_json",
]
