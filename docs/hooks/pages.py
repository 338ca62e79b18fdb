"""The hook of MkDocs: puts what is generated where a page says `<!-- generated: NAME -->`."""

from typing import Any

import generated
import tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called with each page's text."""
    return generated.built(markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called with all files: adds the stored charts as results/NAME.svg."""
    for path in sorted(tables.RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"images/results/{path.name}", abs_src_path=str(path)))
    return files
