"""What is shipped, and that the device code compiles on a machine without the device."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, needs

import fastdynat
import fastdynat.kernels

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())

AOT = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = importlib.import_module("fastdynat.kernels.pgd_step_linf").pgd_step_linf_kernel
names = ["x_adv_ptr", "grad_ptr", "x0_ptr", "out_ptr", "numel", "step_size", "eps", "lo", "hi", "BLOCK"]
for image, grad in (("fp32", "bf16"), ("fp32", "fp32"), ("fp64", "fp16")):
    types = ["*" + image, "*" + grad, "*" + image, "*" + image, "i32", *["fp64"] * 4, "constexpr"]
    source = ASTSource(kernel, signature=dict(zip(names, types, strict=True)), constexprs={"BLOCK": 1024})
    assert ".entry pgd_step_linf_kernel" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""


def test_every_package_on_disk_is_configured() -> None:
    """setuptools ships what is listed; a package that is not listed would be missing only from wheels."""
    on_disk = {path.parent.relative_to(ROOT) for path in (ROOT / "fastdynat").rglob("*.py")}
    names = {".".join(path.parts) for path in on_disk if "__pycache__" not in path.parts} | {"fastdynat.kernels"}
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
    assert CONFIG["project"]["scripts"] == {"fastdynat": "fastdynat.cli:main"}
    assert {"dali", "peer", "tensorboard", "test", "timm"} <= set(CONFIG["project"]["optional-dependencies"])


def test_installed_metadata() -> None:
    try:
        installed = importlib.metadata.distribution("fastdynat")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastdynat is not installed: the checkout is under test")
    assert installed.version == fastdynat.__version__
    assert "fastdynat" in {entry.name for entry in installed.entry_points if entry.group == "console_scripts"}


@needs("triton")
def test_triton_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    # A process of its own: under TRITON_INTERPRET=1, which conftest sets, @triton.jit does not compile.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(fastdynat.__file__).parents[1]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AOT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs("nvcc")
def test_cuda_sources_compile(tmp_path: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    includes = [f"-I{path}" for path in include_paths()]
    flags = ["-std=c++17", "-arch=sm_90", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-O1"]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = [nvcc, *flags, *includes, "-c", str(source), "-o", str(tmp_path / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
