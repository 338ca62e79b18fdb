"""Arguments of a command, split into flags and positionals; errors are one line with the nearest flag."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastdynat.commands.parsing.flags import Flag
from fastdynat.errors import UserError, nearest, shown

# Values that begin with a dash.
NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass
class Words:
    """The parsed arguments.

    Attributes:
        positional: arguments that belong to no flag.
        given: the flags with their values; ("on",) or ("off",) for a switch.
        notes: messages for the user.
    """

    positional: list[str] = field(default_factory=list)
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def for_tyro(self, flags: Mapping[str, Flag]) -> list[str]:
        """The arguments in a form that tyro cannot misread."""
        out = list(self.positional)
        for name, values in self.given.items():
            if flags[name].values == "none":
                out.append(name if values == ("on",) else _negated(name))
            elif flags[name].values == "many":
                out += [name, *values]
            else:
                out += [f"{name}={value}" for value in values]
        return out


def read_words(
    argv: Sequence[str], flags: Mapping[str, Flag], command: str, elsewhere: Mapping[str, str]
) -> Words:
    """Parse `argv`, in which other spellings have been replaced already.

    Args:
        flags: of the command, as `flags_of` gives them.
        command: its name, for messages.
        elsewhere: flags that the command has only next to other flags, each with the explanation.

    Raises:
        UserError: an unknown flag, a missing or wrong value, an argument too many or too few.
    """
    found, words, places = Words(), list(argv), flags.get("positional")
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        if word == "--":
            found.positional += words[i:]
            break
        if not _is_flag(word):
            found.positional.append(word)
            continue
        name, equals, value = word.partition("=")
        flag, on = _lookup(name, flags, command, elsewhere)
        missing = places is not None and not found.positional
        values = [value] if equals else _following(words[i:], flag, places is not None, missing)
        i += 0 if equals else len(values)
        _put(found, flag, _values(flag, on, values, bool(equals)))
    _check_places(found.positional, places, command)
    for name, flag in flags.items():
        if flag.required and not flag.positional and name not in found.given:
            raise UserError(f"fastdynat {command} needs {name}")
    return found


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not NEGATIVE.match(word)


def _negated(name: str) -> str:
    return f"--no-{name.removeprefix('--')}"


def _lookup(
    name: str, flags: Mapping[str, Flag], command: str, elsewhere: Mapping[str, str]
) -> tuple[Flag, bool]:
    """The flag called `name`, and False if `name` is its negated form."""
    known = {key: (flag, True) for key, flag in flags.items() if not flag.positional}
    known |= {_negated(key): (flag, False) for key, (flag, _) in list(known.items()) if flag.values == "none"}
    if name in known:
        return known[name]
    if name in elsewhere:
        raise UserError(f"unknown flag {name}: {elsewhere[name]}")
    hint = nearest(name, known, n=3)
    raise UserError(
        f"unknown flag {name}: "
        + (f"did you mean {hint}?" if hint else f"fastdynat {command} --help lists the flags")
    )


def _following(rest: Sequence[str], flag: Flag, places: bool, missing: bool) -> list[str]:
    """The words after `flag` that are its values.

    places: the command takes positional words; `missing`: and none has been given yet.
    """
    if flag.values == "none" or not rest or _is_flag(rest[0]):
        return []
    if flag.values == "many":
        return list(_until_flag(rest))
    # A bare flag before a run's directory: `eval --compile RUN`.
    if flag.bare is not None and places and not _fits(flag, rest[0]) and _is_place(flag, rest[0], missing):
        return []
    return [rest[0]]


def _until_flag(rest: Sequence[str]) -> Iterator[str]:
    for word in rest:
        if _is_flag(word):
            return
        yield word


def _fits(flag: Flag, text: str) -> bool:
    try:
        flag.read(text)
    except UserError:
        return False
    return True


def _is_place(flag: Flag, text: str, missing: bool) -> bool:
    """True if `text` after the bare `flag` is a run directory or a model, not a misspelt value."""
    if ":" in text or "/" in text or os.path.exists(text):
        return True
    return missing and not nearest(text, flag.choices, n=1)


def _values(flag: Flag, on: bool, values: Sequence[str], equals: bool) -> tuple[str, ...]:
    if flag.values == "none":
        if equals:
            raise UserError(f"{flag.name} takes no value: write {flag.name}, or {_negated(flag.name)}")
        return ("on",) if on else ("off",)
    if not values and flag.bare is not None:
        return (flag.bare,)
    if not values:
        raise UserError(f"{flag.name} needs a value")
    return tuple(flag.read(value) for value in values)


def _put(found: Words, flag: Flag, values: tuple[str, ...]) -> None:
    """Store the values of a flag: the last counts, as scripts with "$@" expect; all if it is repeatable."""
    before = found.given.get(flag.name, ())
    if flag.values == "each":
        values = (*before, *values)
    elif before not in ((), values):
        found.notes.append(f"{flag.name} is given twice: {' '.join(values)} counts, not {' '.join(before)}")
    found.given[flag.name] = values


def _check_places(words: Sequence[str], places: Flag | None, command: str) -> None:
    """Raise UserError for too many or too few positional arguments, or an empty one."""
    if places is None and words:
        raise UserError(
            f"unexpected {shown(words[0])}: fastdynat {command} takes only flags, which begin with --"
        )
    for word in words:
        if not word.strip():
            raise UserError(f"fastdynat {command}: {_place(places)} must not be empty")
        if word.startswith("-"):
            raise UserError(f"unexpected {shown(word)}: write ./{word} for a folder of this name")
    if places is not None and places.values == "one" and len(words) != 1:
        if not words and type(None) in places.kinds:
            return
        if not words:
            raise UserError(f"fastdynat {command} needs {_place(places)}: fastdynat {command} RUN")
        raise UserError(f"unexpected {shown(words[1])}: fastdynat {command} takes only one: {_place(places)}")


def _place(places: Flag | None) -> str:
    """The positional argument in words."""
    return "the name of a recipe" if places is not None and places.name == "name" else "a run directory"
