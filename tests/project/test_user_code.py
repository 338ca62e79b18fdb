"""Files of the user: each imports its own neighbours."""

import sys
from pathlib import Path

import pytest

from fastdynat.user_code import import_object


def folder_with(path: Path, value: int) -> Path:
    (path / "tools").mkdir(parents=True)
    (path / "neighbour.py").write_text(f"K = {value}\n")
    (path / "tools" / "__init__.py").write_text("")
    (path / "tools" / "inner.py").write_text(f"K = {10 * value}\n")
    (path / "m.py").write_text(
        "import json\nimport neighbour\nfrom tools import inner\nfound = (neighbour.K, inner.K)\n"
    )
    return path / "m.py"


@pytest.fixture(autouse=True)
def _no_new_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("neighbour", "tools", "tools.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_neighbours_of_one_name_in_two_folders(tmp_path: Path) -> None:
    one, two = folder_with(tmp_path / "one", 1), folder_with(tmp_path / "two", 2)
    for _ in range(2):
        assert import_object(f"{one}:found")[0] == (1, 10)
        assert import_object(f"{two}:found")[0] == (2, 20)


def test_a_module_of_the_callers_stays_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "own", 5)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    import neighbour  # type: ignore[import-not-found]

    assert import_object(f"{folder_with(tmp_path / 'other', 7)}:found")[0] == (7, 70)
    assert sys.modules["neighbour"] is neighbour
    assert neighbour.K == 5


def test_a_neighbour_is_imported_once(tmp_path: Path) -> None:
    file = folder_with(tmp_path / "one", 1)
    (tmp_path / "one" / "count.txt").write_text("")
    with (tmp_path / "one" / "neighbour.py").open("a") as text:
        text.write(
            "from pathlib import Path\nwith Path(__file__).with_name('count.txt').open('a') as f:\n    "
            "f.write('x')\n"
        )
    for _ in range(3):
        import_object(f"{file}:found")
    assert (tmp_path / "one" / "count.txt").read_text() == "x"
