"""Methods of users' files: ``path/to/file.py:NAME``, a subclass of `Method` with its options.

Such a name is pinned with a digest of the file (`fastdynat.user_code`), so that a run resumes by the code
that it began with. The digest covers the file itself, not what it imports.
"""

import re
from dataclasses import fields
from typing import Any, get_type_hints

from fastdynat.config import GROUPS, TrainConfig
from fastdynat.errors import UserError
from fastdynat.methods.base import Method, check_method
from fastdynat.user_code import import_object, pin, unpinned

_loaded: dict[str, type[Method[Any]]] = {}  # by pinned name: loaded once


def pinned_method(name: str) -> str:
    """``path/to/file.py:NAME`` with absolute path and digest; loads and checks the class.

    Raises:
        UserError: the file or the class is missing, the class is no method, or a pinned file has changed.
    """
    pinned = pin(name)
    if pinned not in _loaded:
        found: Any = import_object(pinned)[0]
        try:
            check_method(found)
            _check_options(found.options_type)
        except UserError as error:
            raise UserError(f"{unpinned(name)}: {error}") from None
        if not isinstance(vars(found).get("name"), str):
            found.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", found.__name__).lower()
        _loaded[pinned] = found
    return pinned


def user_method(name: str) -> type[Method[Any]]:
    """The class of ``path/to/file.py:NAME``. Raises UserError as `pinned_method` does."""
    return _loaded[pinned_method(name)]


def _check_options(options: Any) -> None:
    """Raise UserError unless the fields of `options` can be flags and keys beside those of every run."""
    try:
        options()
    except TypeError as error:
        raise UserError(f"every option needs a default: {error}") from None
    hints = get_type_hints(TrainConfig)
    taken = {field.name for group in GROUPS for field in fields(hints[group])} | {
        "method",
        "options",
        *GROUPS,
    }
    for field in fields(options):
        if field.name in taken:
            raise UserError(
                f"{options.__name__}.{field.name} has the name of a training flag; rename the option"
            )
