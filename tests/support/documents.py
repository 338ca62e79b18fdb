"""README.md and the pages of docs/: their code blocks, and what the comment above a block says about it."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r'^( *)```([a-z]*)(?: title="([^"]+)")?$')
NOTE = re.compile(r"^ *<!-- (.+) -->$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        where: page and line, for messages.
        language: of the fence; "" without one.
        title: the file that it is; None where it is none.
        text: without the fence, unindented.
        not_run: why it cannot run in a test; None where it runs.
        slow: whether it runs only with ``-m slow``.
        extra: flags that the test adds or replaces.
    """

    where: str
    language: str
    title: str | None
    text: str
    not_run: str | None
    slow: bool
    extra: str

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, one line each, without comments."""
        lines = self.text.replace("\\\n", " ").replace("&&", "\n").split("\n")
        return [" ".join(line.partition(" #")[0].split()) for line in lines if line.strip()]


def name_of(page: Path) -> str:
    """A page's path in the checkout."""
    return page.relative_to(ROOT).as_posix()


def written(page: Path) -> str:
    """The text of `page` without what is generated (`docs/hooks/generated.py`)."""
    unfilled: str = hooks("generated").unfilled(page.read_text(encoding="utf-8"))
    return unfilled


def blocks(page: Path) -> list[Block]:
    """Every fenced block of `page` that is not generated.

    Raises ValueError for a comment above one that says nothing known.
    """
    return list(_blocks(page))


def _blocks(page: Path) -> Iterator[Block]:
    lines = written(page).split("\n")
    i = 0
    while i < len(lines):
        opened = FENCE.match(lines[i])
        if opened is None:
            if lines[i].lstrip().startswith("```"):
                raise ValueError(f"{name_of(page)}:{i + 1}: a fence that is not understood: {lines[i]}")
            i += 1
            continue
        indent, language, title = opened.groups()
        end = lines.index(f"{indent}```", i + 1)
        text = "\n".join(line.removeprefix(indent) for line in lines[i + 1 : end]) + "\n"
        where = f"{name_of(page)}:{i + 1}"
        yield Block(where, language, title, text, *_notes(where, lines[:i]))
        i = end + 1


def _notes(where: str, above: list[str]) -> tuple[str | None, bool, str]:
    """Directives in the comments above a block: why it is not run, slow, further flags."""
    not_run, slow, extra = None, False, ""
    for line in reversed(above):
        note = NOTE.match(line)
        if note is None:
            break
        kind, _, rest = note[1].partition(": ")
        if kind == "not run" and rest:
            not_run = rest
        elif kind == "test command":
            not_run = "installs and runs the tests; .ci/run runs it"
        elif kind == "slow" and not rest:
            slow = True
        elif kind == "with" and rest:
            extra = rest
        else:
            raise ValueError(f"{where}: a comment above a block that says nothing known: {note[1]}")
    return not_run, slow, extra


def headings(page: Path) -> set[str]:
    """The anchors of `page`'s headings."""
    found = set()
    for line in page.read_text(encoding="utf-8").split("\n"):
        if re.match(r"#+ ", line):
            given = re.search(r"\{ *#([\w-]+) *\}", line)
            plain = re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip()
            found.add(given[1] if given else re.sub(r"[ -]+", "-", plain))
    return found


def hooks(name: str) -> ModuleType:
    """A module of docs/hooks, which MkDocs imports by itself."""
    folder = str(ROOT / "docs" / "hooks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
