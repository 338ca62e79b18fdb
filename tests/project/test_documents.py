"""The pages of docs/ build without a warning, work offline, and name only what exists."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import needs
from support.documents import PAGES, ROOT, blocks, hooks, name_of, written

from fastdynat.commands.bench.flops import count_step
from fastdynat.commands.evaluate.attack_names import known_names
from fastdynat.commands.speedrun.record_definition import definition_names
from fastdynat.methods import METHODS, Dynat, DynatOptions, Madry, MadryOptions, options_type
from fastdynat.models import build_model
from fastdynat.recipes import recipe_names

# Flags of other programs that the pages show.
FOREIGN = {
    "--flag",
    "--no",
    "--no-build-isolation",
    "--dist",
    "--strict",
    "--examples",
    "--pack",
    "--threads",
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-backend",
    "--standalone",
    "--rdzv-endpoint",
    "--max-restarts",
    "--backend",
    "--kill-on-bad-exit",
    "--requeue",
    "--work",
    "--commit",
}
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text(encoding="utf-8")


@needs("mkdocs", "material", "mkdocstrings")
def test_the_pages_build_and_hold_what_is_generated(site: Path) -> None:
    flags = page(site, "reference/cli")
    assert all(f"<code>{name}</code>" in flags for name in ("--awp", "--checks", "--budget-seconds"))
    assert all(f'id="{name}"' in flags for name in METHODS)
    assert all(f"<code>{name}</code>" in page(site, "train/recipes") for name in recipe_names())
    attacks = page(site, "evaluate/attacks")
    assert all(f"<code>{name}</code>" in attacks for name in known_names())
    assert 'class="layers"' in page(site, "design")
    assert not [
        path for path in site.rglob("*.html") if "<!-- generated:" in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_tables_in_a_page_are_those_generated_now(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert hooks("generated").filled(text) == text, "python docs/hooks/generated.py writes them anew"


def test_generated_text_replaces_what_stands_in_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    generated = hooks("generated")
    monkeypatch.setattr(generated, "GENERATED", {"results: a": lambda: "now", "methods": lambda: "flags"})
    bare = "x\n<!-- generated: results: a -->\ny\n<!-- generated: methods -->\nz\n"
    full = generated.filled(bare.replace("a -->\n", f"a -->\n\nold\n\n{generated.END}\n"))
    assert full == bare.replace("a -->\n", f"a -->\n\nnow\n\n{generated.END}\n")
    assert generated.filled(full) == full
    assert generated.unfilled(full) == bare
    assert generated.built(full) == generated.built(bare) == "x\nnow\ny\nflags\nz\n"


@needs("mkdocs", "material", "mkdocstrings")
def test_the_pages_fetch_nothing(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?:', text), path
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preload|preconnect)"[^>]+href="https?:', text), (
            path
        )


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [name for name in pages if name not in listed] == []


@cache
def known_flags() -> set[str]:
    """Every flag of every command, of every method's options, and the spellings that are understood."""
    flags = hooks("flag_tables")
    found = {
        row[0].strip("`")
        for command in flags.COMMANDS.values()
        for group in flags.groups(command)
        for row in group.rows
    }
    for method in METHODS:
        found |= {row[0].strip("`") for group in flags.groups(options_type(method)) for row in group.rows}
    found |= {flag.replace("--", "--no-", 1) for flag in found}
    return (
        found
        | flags.SPELLINGS.keys()
        | set(flags.GPU)
        | {o for others in flags.SPELLINGS.values() for o in others}
    )


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_flag_that_a_page_names_exists(path: Path) -> None:
    text = written(path)
    code = [*re.findall(r"`([^`\n]+)`", text), *(block.text for block in blocks(path))]
    named = {flag for words in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", words)}
    assert named - known_flags() - FOREIGN - {"--help", "--squeeze-weight"} == set()


def test_the_reference_has_a_table_of_every_command() -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text()
    tables = re.findall(r"<!-- generated: command: (\w+) -->", text)
    assert sorted(tables) == sorted(hooks("flag_tables").COMMANDS)


def test_the_table_of_methods_has_every_method() -> None:
    text = (ROOT / "docs" / "train" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("## DYNAT")[0], re.MULTILINE)
    assert sorted(rows) == sorted(METHODS)


def test_every_stored_result_is_shown() -> None:
    tables = hooks("result_tables").TABLES
    shown = {name for _, sources in tables.values() for name in sources}
    assert {path.stem for path in RESULTS} == shown
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    used = set(re.findall(r"<!-- generated: results: (\S+) -->", pages))
    assert used | {"summary"} == tables.keys()


def test_a_projection_timed_against_bisection_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = hooks("result_tables")
    stored = tables.read("operators_cpu")
    assert ("60 rounds of bisection" in tables.operators()) is stored["commit"].startswith(tables.BISECTED)
    again = {**stored, "commit": "another"}
    monkeypatch.setattr(tables, "read", lambda name: again)
    assert "bisection" not in tables.operators()


def test_the_attacks_share_of_a_step_is_the_one_counted() -> None:
    def net() -> torch.nn.Module:
        return build_model("resnet18", num_classes=10, image_shape=(3, 32, 32))

    madry = count_step(Madry(MadryOptions()), net(), None, (3, 32, 32), attack_steps=10)
    dynat = count_step(Dynat(DynatOptions()), net(), net(), (3, 32, 32), attack_steps=10)
    shares = [f"{10 * flops.attack_step / flops.step:.0%}".replace("%", " %") for flops in (madry, dynat)]
    text = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    assert (
        f"takes {shares[0]} of the arithmetic of a step of Madry's method, and {shares[1]} of DYNAT's" in text
    )


def test_the_methods_with_the_fewest_epochs_are_those_named() -> None:
    rows = hooks("tables").read("compare_cifar10_jpeg_small_cpu")["rows"]
    epochs = {row["method"]: row["epochs"] for row in rows}
    assert {name for name, count in epochs.items() if count == min(epochs.values())} == {"lbgat", "dyart"}
    assert max(rows, key=lambda row: row["seconds_per_epoch"]["mean"])["method"] == "dyart"
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert "LBGAT and DyART get the fewest. An epoch of DyART takes longest" in text


def test_no_stored_row_failed_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = hooks("tables")
    for path in RESULTS:
        tables.read(path.stem)
    row = {"name": "fp32", "kind": "attack", "invalid": "the attack is weaker"}
    (tmp_path / "engine.json").write_text(json.dumps({"rows": [row]}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"engine\.json: fp32 does not count \(the attack is weaker\)"):
        tables.read("engine")


def test_every_result_of_the_race_is_shown() -> None:
    shown = hooks("speedrun_tables").log()
    found = sorted((ROOT / "bench" / "records").glob("*.json"))
    assert [path.name for path in found if f"bench/records/{path.name}`" not in shown] == []
    assert all(f"`{name}`" in shown for name in definition_names())
    assert "<!-- generated: speedrun -->" in (ROOT / "docs" / "speedrun.md").read_text(encoding="utf-8")


def test_the_races_speed_up_in_the_readme_is_that_within_races() -> None:
    """Seconds of cpu2-sharp and cpu2-noise in one race, of cpu2-noise and the baseline in another."""
    found = {}
    for name in ("cpu2-sharp", "cpu2-noise"):
        stored = json.loads((ROOT / "bench" / "records" / f"{name}.json").read_text(encoding="utf-8"))
        own = [lap["seconds"] for lap in stored["laps"]]
        found[name] = {beside: sum(times) / sum(own) for beside, times in stored["alongside"].items()}
    expected = found["cpu2-sharp"]["cpu2-noise"] * found["cpu2-noise"]["cpu2-plain-madry"]
    assert hooks("speedrun_tables").race_row()[-1] == f"~{expected:.1f}"
    text = (ROOT / "docs" / "speedrun.md").read_text(encoding="utf-8")
    assert f"give {expected:.1f} for `cpu2-sharp` over the baseline" in text


def test_the_evaluation_names_that_a_page_lists_exist() -> None:
    text = (ROOT / "docs" / "evaluate" / "index.md").read_text(encoding="utf-8")
    names = re.findall(
        r"`(\w+)`", text.partition("`fastdynat.evaluation` also has ")[2].partition("[The reference]")[0]
    )
    assert len(names) >= 5
    evaluation = importlib.import_module("fastdynat.evaluation")
    assert [name for name in names if not callable(getattr(evaluation, name, None))] == []


def test_the_files_that_pages_name_exist() -> None:
    missing = []
    for path in PAGES:
        for name in re.findall(
            r"`((?:fastdynat|kernels|csrc|tests|bench)/[\w./]*)`", path.read_text(encoding="utf-8")
        ):
            if not (ROOT / name).exists() and "NAME" not in name:
                missing.append((name_of(path), name))
    assert missing == []
