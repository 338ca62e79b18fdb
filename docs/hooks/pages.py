"""The hook of MkDocs: puts what is generated where a page says `<!-- generated: NAME -->`."""

import re
from collections.abc import Callable
from typing import Any

import api_pages
import flag_tables
import layer_picture
import record_tables
import result_tables
import speedrun_tables
import tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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
MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called with each page's text. Raises KeyError for a mark that stands for nothing."""
    return MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called with all files: adds the stored charts as results/NAME.svg."""
    for path in sorted(tables.RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"images/results/{path.name}", abs_src_path=str(path)))
    return files
