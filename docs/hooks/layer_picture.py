"""The picture of the layers, drawn from the ones that the tests hold the package to."""

import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
WIDTH, LEFT, ROW, BOX = 860, 30, 44, 30


def layers() -> list[list[str]]:
    """LAYERS of test_layers.py, lowest first, without running it."""
    (path,) = (ROOT / "tests").rglob("test_layers.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(name, ast.Name) and name.id == "LAYERS" for name in node.targets
        ):
            return [sorted(layer) for layer in ast.literal_eval(node.value)]
    raise ValueError(f"{path} has no LAYERS")


def folder(name: str) -> Path:
    """Where the package called `name` lies, if it is one."""
    return ROOT / "kernels" if name == "kernels" else ROOT / "fastdynat" / name.replace(".", "/")


def about(name: str) -> str:
    """The first paragraph of the docstring of fastdynat's module or package called `name`."""
    package = folder(name)
    path = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def picture() -> str:
    """An SVG of the layers, highest first; each name has its module's docstring as its title."""
    rows = [wrapped(layer) for layer in reversed(layers()) if layer != ["__main__"]]
    height, y, parts = 20 + sum(ROW * len(lines) for lines in rows), 10, []
    for lines in rows:
        tall = ROW * len(lines)
        parts.append(
            f'<rect class="layer" x="{LEFT - 20}" y="{y + 2}" width="{WIDTH - 20}" height="{tall - 4}" '
            f'rx="6"/>'
        )
        for i, line in enumerate(lines):
            x = LEFT
            for name in line:
                parts.append(box(name, x, y + ROW * i + (ROW - BOX) // 2))
                x += wide(name) + 8
            if len(line) == 1:
                parts.append(
                    f'<text class="about" x="{x + 8}" '
                    f'y="{y + ROW * i + ROW // 2 + 4}">{short(line[0], x)}</text>'
                )
        y += tall
    svg = (
        f'<svg class="layers" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Layers">{"".join(parts)}</svg>'
    )
    return f"<div>{svg}</div>"  # in one line, or Markdown makes paragraphs of it


def short(name: str, x: int) -> str:
    """The part of `name`'s description that fits from pixel `x` on, cut at a punctuation mark."""
    text = re.split(r"[.:;] |[.:;]$", about(name).replace("`", ""))[0]
    most = (WIDTH - 40 - x) * 10 // 63
    return escape(text if len(text) <= most else f"{text[:most].rpartition(' ')[0]} ...")


def wide(name: str) -> int:
    """Pixels of the box of `name`."""
    return 9 * len(name) + 20


def wrapped(names: list[str]) -> list[list[str]]:
    """`names` in lines that fit."""
    lines: list[list[str]] = [[]]
    for name in names:
        if lines[-1] and sum(wide(other) + 8 for other in [*lines[-1], name]) > WIDTH - 60:
            lines.append([])
        lines[-1].append(name)
    return lines


def box(name: str, x: int, y: int) -> str:
    """One name in its box."""
    kind = "package" if folder(name).is_dir() else "module"
    return (
        f'<g class="{kind}"><title>{escape(about(name))}</title>'
        f'<rect x="{x}" y="{y}" width="{wide(name)}" height="{BOX}" rx="5"/>'
        f'<text x="{x + wide(name) / 2:g}" y="{y + BOX / 2 + 5:g}">{name}</text></g>'
    )


def rooms() -> str:
    """A Markdown table of what each package is for, highest first."""
    names = [name for layer in reversed(layers()) for name in layer if folder(name).is_dir()]
    lines = ["| Package | |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {about(name)} |" for name in names)])
