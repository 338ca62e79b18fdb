"""Every document that the product stores or takes is read here: type, range, depth and size are checked
before use.

A document that cannot be used raises `DocumentError`, a `UserError` of one line: the file, the key, what was
expected, and the remedy. Nothing here runs code from a file, waits for a pipe without a limit, or imports
torch.
"""

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
from fastdynat.documents.records import as_json, convert, parse_json, read_json, read_json_lines
from fastdynat.documents.yamls import parse_yaml, read_yaml_value

__all__ = [
    "DocumentError",
    "as_json",
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
]
