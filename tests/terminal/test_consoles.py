"""Names that users choose (classes, runs, models) are printed as they are: no markup, no emoji."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastdynat.commands.main import main
from fastdynat.terminal.consoles import (
    AS_IS,
    PlainTable,
    error_console,
    output_console,
    plain_column,
)

ROOT = Path(__file__).parents[2] / "fastdynat"
NAMES = ("b[bold]c", "[red]:smile:[/red]", "[/]", "x:warning:y", "[link=file:///]z")


def printed(value: object, **options: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200, **options).print(value)
    return out.getvalue()


def test_a_table_on_any_console() -> None:
    table = PlainTable("one[i]", title="of [bold] :smile:")
    table.add_column(":smile:")
    for name in NAMES:
        table.add_row(name, name)
    text = printed(table)
    assert all(text.count(name) == 2 for name in NAMES)
    assert "one[i]" in text
    assert "of [bold] :smile:" in text
    assert ":smile:" in text


@pytest.mark.parametrize("name", NAMES)
def test_consoles_and_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    output_console().print(name)
    error_console().print(name)
    out, err = capsys.readouterr()
    assert out == err == f"{name}\n"

    class Task:
        description = name

    column = plain_column("{task.description}")
    assert column.render(Task()).plain == name  # type: ignore[arg-type]


def test_a_run_and_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("b[bold]c", "x:warning:y")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(6):
                pixels = np.full((8, 8, 3), 40 * label + index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    run = tmp_path / "r[bold]:smile:"
    flags = [
        "--data",
        "imagefolder",
        "--data-dir",
        str(tmp_path / "data"),
        "--method",
        "natural",
        "--model",
        "small",
    ]
    flags += ["--epochs", "1", "--val-size", "2", "--batch-size", "5"]
    assert main(["train", "--run-dir", str(run), *flags]) == 0
    assert f"run directory {run}," in capsys.readouterr().err
    assert main(["eval", str(run), "--attacks", "clean", "--per-class"]) == 0
    out = capsys.readouterr().out
    assert "│ b[bold]c " in out
    assert "│ x:warning:y " in out
    assert "r[bold]:smile:" in out
    assert main(["export", str(run), "--out", str(tmp_path / "a[b]c.pt2"), "--format", "torch"]) == 0
    assert "a[b]c.pt2: read back" in capsys.readouterr().err


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_consoles_tables_and_columns_are_made_in_one_place() -> None:
    """Whoever makes one elsewhere gets rich's markup back."""
    found = []
    for path in ROOT.rglob("*.py"):
        if path.name == "consoles.py":
            continue
        for call in calls(path):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            if name in ("Console", "Table", "TextColumn"):
                found.append(f"{path.name}: {name}")
            if (
                isinstance(call.func, ast.Attribute)
                and call.func.attr == "print"
                and "console" in ast.unparse(call.func.value)
            ):
                plain = {key.arg for key in call.keywords} >= {"markup", "emoji"} or any(
                    key.arg is None and ast.unparse(key.value) == "AS_IS" for key in call.keywords
                )
                argument = call.args[0] if call.args else None
                if not plain and not isinstance(argument, (ast.Name, ast.IfExp)):
                    found.append(f"{path.name}: {ast.unparse(call)}")
    assert found == []
    assert AS_IS == {"markup": False, "emoji": False, "highlight": False}
