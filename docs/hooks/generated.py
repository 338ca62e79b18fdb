"""What the pages show where they say `<!-- generated: NAME -->`; run as a program, writes tables into them.

Readers of the files, as on GitHub, see the tables of stored results, records, recipes and attacks: they stand
in the page, between the mark and `<!-- end of generated -->`, and a test compares them with what is generated
now. Tables of flags and docstrings would fill those files, and are made only when the site is built.
"""

import re
from collections.abc import Callable
from pathlib import Path

import api_pages
import flag_tables
import layer_picture
import record_tables
import result_tables
import speedrun_tables

DOCS = Path(__file__).parents[1]
# Files of the top folder that are also pages link to other pages from there.
LINK = re.compile(r"\]\(docs/([^)]+)\)")

PACKAGES = ("fastdynat", "fastdynat.evaluation", "fastdynat.ops", *api_pages.PICKED)


def file(name: str) -> str:
    """A file of the top folder as a page of docs/."""
    text = (layer_picture.ROOT / name).read_text(encoding="utf-8")
    return LINK.sub(r"](\1)", text)


GENERATED: dict[str, Callable[[], str]] = {
    "methods": flag_tables.methods,
    "spellings": flag_tables.spellings,
    "attacks": flag_tables.attacks,
    "recipes": flag_tables.recipes,
    "records": record_tables.records,
    "speedrun": speedrun_tables.log,
    "speedrun-predictions": speedrun_tables.predictions,
    "speedrun-fastest": speedrun_tables.fastest,
    "layers": layer_picture.picture,
    "rooms": layer_picture.rooms,
    **{f"file: {name}": (lambda name=name: file(name)) for name in ("CONTRIBUTING.md", "CHANGELOG.md")},
    **{f"api: {name}": (lambda name=name: api_pages.api(name)) for name in PACKAGES},
    **{f"command: {name}": (lambda name=name: flag_tables.command(name)) for name in flag_tables.COMMANDS},
    **{f"results: {name}": (lambda name=name: result_tables.render(name)) for name in result_tables.TABLES},
}
IN_FILES = re.compile(r"results: .+|speedrun.*|records|recipes|attacks|rooms")
END = "<!-- end of generated -->"
MARK = re.compile(rf"^<!-- generated: (.+) -->\n(?:(?:(?!<!-- generated: ).*\n)*?{END}\n)?", re.MULTILINE)


def built(markdown: str) -> str:
    """`markdown` with everything generated. Raises KeyError for a mark that stands for nothing."""
    return MARK.sub(lambda match: GENERATED[match[1]]().rstrip() + "\n", markdown)


def filled(markdown: str) -> str:
    """`markdown` with the marks of `IN_FILES` followed by what is generated now."""
    return MARK.sub(_in_file, markdown)


def unfilled(markdown: str) -> str:
    """`markdown` with nothing generated but the marks."""
    return MARK.sub(lambda match: f"<!-- generated: {match[1]} -->\n", markdown)


def _in_file(match: re.Match[str]) -> str:
    mark = f"<!-- generated: {match[1]} -->\n"
    if not IN_FILES.fullmatch(match[1]):
        return mark
    # An empty line ends the HTML of a comment, as Markdown reads it.
    return f"{mark}\n{GENERATED[match[1]]().strip()}\n\n{END}\n"


def write() -> None:
    """Write the tables into the pages."""
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    write()
