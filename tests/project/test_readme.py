"""README.md is short and true, and its test command is that of .ci/run."""

import re
import subprocess

from support.documents import README, ROOT, headings, hooks

TEXT = README.read_text(encoding="utf-8")


def test_it_is_short_and_has_one_picture() -> None:
    assert len(TEXT.splitlines()) <= 150
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    assert len(prose.split()) <= 1000
    assert len(re.findall(r"!\[", TEXT)) == 1


def test_ci_runs_its_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    found = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("python3 -m venv .venv")
    assert found.stdout.strip().endswith("pytest -n 2 --dist loadfile")
    assert found.stdout.strip() in TEXT


def test_the_test_command_installs_what_ci_requires() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    required = re.search(r"FASTDYNAT_REQUIRE=(\S+)", script)
    assert required is not None
    assert "mkdocs" in required[1].split(",")
    assert "pip install mkdocs-material 'mkdocstrings[python]' && " in TEXT


def test_its_table_is_drawn_from_stored_results() -> None:
    assert f"\n{hooks('result_tables').summary()}\n" in TEXT


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        name, _, anchor = link.partition("#")
        assert (ROOT / name).is_file(), link
        assert not anchor or anchor in headings(ROOT / name), link
