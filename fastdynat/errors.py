"""Errors for the user to fix: one line that names the value and the remedy."""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable

LONGEST = 60  # characters of a name or value in a message
MISSPELT = 0.8  # similarity of a name to the one that is meant, from 0 to 1


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with code 2."""


class ToldElsewhere(UserError):
    """Bad input that another process of the same world reports: this one ends as silently as it can."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, brief: bool = False) -> UserError:
    """The error for a name that is not in `known`; suggests the nearest names.

    Args:
        brief: list the known names only where none is near.

    >>> str(unknown_name("model", "resnet81", ["resnet18", "small"]))
    "unknown model 'resnet81': did you mean 'resnet18'? known: resnet18, small"
    >>> str(unknown_name("key", "attack_steps", ["attack_bn", "steps"], brief=True))
    "unknown key 'attack_steps': did you mean 'steps'?"
    """
    known, wanted = sorted(known), name[:LONGEST].lower()
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if not difflib.get_close_matches(wanted, known, n=1, cutoff=MISSPELT):
        near = [text for text in known if wanted.endswith(f"_{text}")] or near  # a word too many in front
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if hint and brief:
        return UserError(f"unknown {kind} {shown(name)}: {hint.rstrip()}")
    return UserError(f"unknown {kind} {shown(name)}: {hint}known: {', '.join(known)}")


def nearest(name: str, known: Iterable[str], n: int) -> str:
    """Up to `n` of the names `known` that are near `name`, best first, joined by "or"; empty if none is near.

    Dashes in front do not count as alike, and names much farther than the best are left out.

    >>> nearest("--epoch-s", ["--eps", "--epochs", "--lr"], n=3)
    '--epochs'
    >>> nearest("--bogus", ["--bias", "--guide"], n=3)
    ''
    """
    plain, by_name = name[:LONGEST].lower().lstrip("-"), {text.lstrip("-"): text for text in known}
    found = difflib.get_close_matches(plain, list(by_name), n=n)
    ratios = [difflib.SequenceMatcher(None, text, plain).ratio() for text in found]
    return " or ".join(
        by_name[text] for text, ratio in zip(found, ratios, strict=True) if ratio > ratios[0] - 0.15
    )


def shown(text: str) -> str:
    """`text` in quotes for a message, cut where it is long.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'"
    """
    return repr(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def first_line(error: BaseException) -> str:
    """The first line of `error`'s message, at most 160 characters, or the name of its type if it has none.

    >>> first_line(ValueError("no\\nway")), first_line(ValueError())
    ('no', 'ValueError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def not_a_name(text: str) -> str | None:
    """The reason why no file or argument can be named `text`, as a predicate; None if it can.

    >>> not_a_name("a\\0b")
    'has a NUL character'
    """
    if "\0" in text:
        return "has a NUL character"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # a surrogate that stands for no byte of a path
        return "is not valid text"
    return None


def one_line(text: str) -> str:
    """`text` as a terminal shows it in one line: control characters and bytes that are no text are escaped.

    >>> one_line("no run at a\\nb")
    'no run at a\\\\nb'
    """
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") else repr(c)[1:-1] for c in text
    )


def shortage(error: BaseException) -> str | None:
    """Describe a lack of memory or threads in `error`, with a remedy; None if it is another error."""
    said = str(error)
    if isinstance(error, RuntimeError) and "start new thread" in said:
        return "the system lets this process start no more threads: end other programs, or raise ulimit -u"
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and out_of_memory(error)):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", said)
    how_much = f" ({asked[1]} more were asked for)" if asked else ""
    return (
        f"out of memory{how_much}: in train, add --grad-accum-steps 2 (the same update in two parts, also "
        "with --resume) or --grad-checkpointing; elsewhere use a smaller --batch-size; or use a smaller "
        "model or --image-size, or end other programs"
    )


def out_of_memory(error: BaseException) -> bool:
    """True if `error` means that a GPU or the CPU allocator ran out of memory."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED", "bad_alloc")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in said)
