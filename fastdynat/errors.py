"""Errors that are the caller's to fix: one line that names the value and the remedy."""

import difflib
from collections.abc import Iterable

LONGEST = 60  # characters of a name or value in a message


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with code 2."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`; suggests the nearest names.

    >>> str(unknown_name("model", "resnet81", ["resnet18", "small"]))
    "unknown model 'resnet81': did you mean 'resnet18'? known: resnet18, small"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name[:LONGEST].lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {kind} {shown(name)}: {hint}known: {', '.join(known)}")


def nearest(name: str, known: Iterable[str], n: int) -> str:
    """Up to `n` of the names `known` that are most like `name`, best first, joined by "or"; empty where none is.

    >>> nearest("--ep-silon", ["--eps", "--epochs", "--lr"], n=1)
    '--epochs'
    """
    found = difflib.get_close_matches(name[:LONGEST].lower(), list(known), n=n, cutoff=0.55)
    return " or ".join(found)


def shown(text: str) -> str:
    """`text` in quotes for a message, cut where it is long.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'"
    """
    return repr(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 160 characters; its type's name where it says nothing.

    >>> first_line(ValueError("no\nway")), first_line(ValueError())
    ('no', 'ValueError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
