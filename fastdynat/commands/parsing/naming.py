"""Error messages in terms of flags: --step-size where a check says step_size."""

import re
from collections.abc import Sequence

from fastdynat.commands.parsing.aliases import ALIASES
from fastdynat.errors import shown


def name_flags(message: str, argv: Sequence[str]) -> str:
    """`message` about a configuration key or value, with the flag that gave it.

    >>> name_flags("step_size must be above 0, got 0", ["train", "--step_size=0"])
    '--step-size must be above 0, got 0'
    >>> name_flags("unknown model 'x'", ["train", "--guide", "x"])
    "--guide: unknown model 'x'"
    """
    given = _given(argv)
    key = re.match(r"\w+", message)
    if key is not None and (flag := f"--{key[0].replace('_', '-')}") in given:
        return flag + message[key.end() :]
    if "--" in message:
        return message
    about = [
        flag for flag, value in given.items() if value and shown(value) in message and flag not in ALIASES
    ]
    return f"{about[0]}: {message}" if len(about) == 1 else message


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The flags in `argv` by the commands' own names for them, each with the argument that is its value."""
    found: dict[str, str] = {}
    for i, word in enumerate(argv):
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-") if name.startswith("--") else name
            word = value if equals else next(iter(argv[i + 1 : i + 2]), "")
            # What is another script's spelling in one command is a flag of its own in another.
            found |= {ALIASES.get(name, name): word, name: word}
    return found
