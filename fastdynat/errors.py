"""Errors that are the caller's to fix: one line that names the value and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with code 2."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`; suggests the nearest names.

    >>> str(unknown_name("model", "resnet81", ["resnet18", "small"]))
    "unknown model 'resnet81': did you mean 'resnet18'? known: resnet18, small"
    """
    known, name = sorted(known), name if len(name) <= 80 else f"{name[:80]}..."
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 160 characters; its type's name where it says nothing.

    >>> first_line(ValueError("no\nway")), first_line(ValueError())
    ('no', 'ValueError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
