"""One word, one thing: public names and file names are unique, and docstrings name their subject."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUESTIONS = ("How", "What", "Whether", "Which", "Who", "Whose", "Why")
# Each command that is a package has its entry point, which the loader of commands/ imports, in `command.py`.
ENTRY_POINTS = "command.py"


@cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    """Every module of the package but those of kernels/, which have the names of their operators in ops/."""
    files = [path for path in sorted((ROOT / "fastdynat").rglob("*.py")) if "kernels" not in path.parts]
    return tuple((str(path.relative_to(ROOT / "fastdynat")), ast.parse(path.read_text())) for path in files)


def twice(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = defaultdict(list)
    for name, place in found:
        places[name].append(place)
    return {name: where for name, where in places.items() if len(where) > 1}


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name


def docstrings(tree: ast.Module) -> Iterator[str]:
    """All docstrings, and the strings below the fields of a class, which document these."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield text.strip()


def asks(docstring: str) -> bool:
    return docstring.split(" ")[0] in QUESTIONS


def test_no_public_name_means_two_things() -> None:
    assert twice((name, place) for place, tree in modules() for name in public_names(tree)) == {}


def test_no_two_files_have_one_name() -> None:
    places = [Path(place) for place, _ in modules()]
    names = [(place.name, str(place)) for place in places if place.name not in ("__init__.py", ENTRY_POINTS)]
    assert twice(names) == {}
    entries = [place.parent.parent for place in places if place.name == ENTRY_POINTS]
    assert set(entries) == {Path("commands")}


def test_docstrings_name_their_subject() -> None:
    assert [place for place, tree in modules() if not ast.get_docstring(tree)] == []
    found = [f"{place}: {text}" for place, tree in modules() for text in docstrings(tree) if asks(text)]
    assert found == []


def test_test_modules_name_their_subject() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    first = {path.name: ast.get_docstring(ast.parse(path.read_text())) or "What" for path in files}
    assert [f"{name}: {text}" for name, text in first.items() if asks(text)] == []


def test_what_is_looked_for_is_found() -> None:
    assert twice([("a", "x.py"), ("b", "x.py"), ("a", "y.py")]) == {"a": ["x.py", "y.py"]}
    tree = ast.parse(
        '"""Words."""\nclass A:\n    b = 1\n    """How b is."""\n    def c(self):\n        """C."""'
    )
    assert [asks(text) for text in docstrings(tree)] == [False, True, False]
    assert list(public_names(tree)) == ["A"]
