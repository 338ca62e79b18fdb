"""Contents of the wheel and of the source distribution."""

import importlib.metadata
import os
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import fastdynat

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_on_disk_is_configured() -> None:
    """setuptools ships what is listed; a package that is not listed would be missing only from wheels."""
    on_disk = {path.parent.relative_to(ROOT) for path in (ROOT / "fastdynat").rglob("*.py")}
    names = {".".join(path.parts) for path in on_disk if "__pycache__" not in path.parts} | {
        "fastdynat.kernels"
    }
    assert sorted(names) == sorted(CONFIG["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init() -> None:
    for name in CONFIG["tool"]["setuptools"]["packages"]:
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name


def test_kernels_link_and_mapping_agree() -> None:
    assert CONFIG["tool"]["setuptools"]["package-dir"] == {"fastdynat.kernels": "kernels"}
    link = ROOT / "fastdynat" / "kernels"
    assert link.resolve() == ROOT / "kernels"
    assert os.readlink(link) == "../kernels"


def test_typed_marker_is_shipped() -> None:
    assert CONFIG["tool"]["setuptools"]["package-data"]["fastdynat"] == ["py.typed"]
    assert (Path(fastdynat.__file__).parent / "py.typed").is_file()


def test_version_has_one_source() -> None:
    assert CONFIG["project"]["dynamic"] == ["version"]
    assert CONFIG["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastdynat.__version__"}


def test_names_for_users() -> None:
    assert CONFIG["project"]["scripts"] == {"fastdynat": "fastdynat.commands.main:program"}
    assert {"dali", "peer", "tensorboard", "test", "timm"} <= set(CONFIG["project"]["optional-dependencies"])


def test_installed_metadata() -> None:
    try:
        installed = importlib.metadata.distribution("fastdynat")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastdynat is not installed: the checkout is under test")
    assert installed.version == fastdynat.__version__
    assert "fastdynat" in {entry.name for entry in installed.entry_points if entry.group == "console_scripts"}
