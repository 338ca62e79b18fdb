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
    shown,
)
from fastdynat.documents.pickles import check_pickle
from fastdynat.documents.records import convert, parse_json, read_json, read_json_lines
from fastdynat.documents.yamls import parse_yaml, read_yaml

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
    "read_yaml",
    "regular_file",
    "shown",
]
