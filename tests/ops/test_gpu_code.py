"""Kernels compile for sm_80 and sm_90 without a GPU, spill no registers and read 16 bytes at a time.

What no compiler knows without a GPU, how fast it is, is left to bench/.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, needs

ARCHS = ("sm_80", "sm_90")
LINF = "pgd_step_linf.cu"
# Seconds each: one in every run, all of them with the slow tests.
SOURCES = [
    pytest.param(path, id=path.name, marks=[] if path.name == LINF else pytest.mark.slow)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
]

# Triton launches that may spill: what they are, bytes per thread, why.
MAY_SPILL = [
    (
        r"^pgd_step_l1_kernel\(PARTS=1, BLOCK=8192,.* on \*fp64",
        48,
        "float64: less than reading the image again in every pass",
    ),
    (r"^pgd_step_l2_kernel\(HAS_LOW=True, BLOCK=8192,", 12, "less than reading the image twice"),
    (
        r"^attack_logit_grad_kernel\(LOSS=3, RESCALE=True, ROWS=1, BLOCK=8192,",
        12,
        "the DLR loss on over 4096 classes is rare",
    ),
    (r"^dynamic_label_cross_entropy_kernel\(.*BLOCK_K=32768,", 1200, "rows of over 16384 classes are rare"),
]


def run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout + done.stderr


def tool(name: str) -> str:
    """A program of the CUDA toolkit: Triton's copy, which is there without a toolkit."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def spilled(report: str) -> dict[str, int]:
    """Spilled bytes by function, as `ptxas -v` reports them; functions without spills are left out."""
    pattern = (
        r"Function properties for (\S+)\s+"
        r"\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    found = re.findall(pattern, report)
    assert found, report
    return {
        name: max(int(stores), int(loads)) for name, stores, loads in found if (stores, loads) != ("0", "0")
    }


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compiled kernels, by triton_launches.py in its own process: TRITON_INTERPRET=1 disables compilation."""
    folder = tmp_path_factory.mktemp("triton")
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "FASTDYNAT_KERNELS")
    }
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    script = ROOT / "tests" / "support" / "triton_launches.py"
    done = subprocess.run([sys.executable, script, folder], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs("triton")
def test_every_triton_kernel_is_compiled(launched: list[dict[str, Any]]) -> None:
    assert launched[-1] == {"not launched": []}, "add calls to LAUNCHES in triton_launches.py"
    for arch in (80, 90):
        assert {"pgd_step_linf_kernel"} <= {
            line["kernel"] for line in launched[:-1] if line["capability"] == arch
        }


@needs("triton")
def test_triton_kernels_do_not_spill(launched: list[dict[str, Any]], tmp_path: Path) -> None:
    spills = []
    for line in launched[:-1]:
        target = re.search(r"^\.target (\w+)", Path(line["ptx"]).read_text(), re.MULTILINE)
        assert target is not None
        assert target[1].startswith(f"sm_{line['capability']}")
        report = run(
            line["ptxas"], "-v", f"--gpu-name={target[1]}", line["ptx"], "-o", tmp_path / "out.cubin"
        )
        allowed = max(
            (most for pattern, most, _ in MAY_SPILL if re.search(pattern, line["launch"])), default=0
        )
        if (spill := sum(spilled(report).values())) > allowed:
            spills.append(f"sm_{line['capability']}, {spill} bytes: {line['launch']}")
    assert not spills, "\n".join(spills)


@needs("triton")
def test_triton_kernels_read_16_bytes_at_a_time(launched: list[dict[str, Any]]) -> None:
    wide = re.compile(r"ld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)\b")
    expected = [line for line in launched[:-1] if line["wide"]]
    assert expected
    for line in expected:
        assert wide.search(Path(line["ptx"]).read_text()), line


@needs("triton")
def test_the_ratio_of_the_dlr_loss_is_rounded_to_nearest(launched: list[dict[str, Any]]) -> None:
    """Triton's own division is off by up to two units in the last place, but exact in its interpreter."""
    ratios = [
        line
        for line in launched[:-1]
        if line["kernel"] == "attack_logit_grad_kernel" and "LOSS=3" in line["launch"]
    ]
    assert ratios
    for line in ratios:
        assert re.search(r"\bdiv\.rn\.f(32|64)\b", Path(line["ptx"]).read_text()), line


@needs("triton")
def test_triton_does_not_contract_into_fma(launched: list[dict[str, Any]]) -> None:
    """Elementwise results must equal the other implementations'; exponentials and logarithms use FMAs."""
    elementwise = [
        line for line in launched[:-1] if re.match("augment|pgd_step|project|random_start", line["kernel"])
    ]
    assert {"augment_kernel", "pgd_step_linf_kernel", "random_start_kernel"} <= {
        line["kernel"] for line in elementwise
    }
    for line in elementwise:
        ptx = Path(line["ptx"]).read_text()
        assert not re.search(r"\bfma\.", ptx), line
        assert re.search(r"\b(add|sub|div)\S*\.f(32|64)\b", ptx), line


class CudaCode:
    """nvcc's report on a source, and the machine code by function."""

    def __init__(self, source: Path, folder: Path) -> None:
        torch_include = Path(torch.__file__).parent / "include"
        flags = [
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
        ]
        targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
        self.binary = folder / f"{source.stem}.fatbin"
        self.report = run(
            *(shutil.which("nvcc") or "nvcc", *flags, f"-I{torch_include}", *targets),
            *("-fatbin", "-Xptxas", "-v", source, "-o", self.binary),
        )

    def functions(self, arch: str) -> Iterator[tuple[str, str]]:
        listing = run(
            tool("cuobjdump"),
            "-sass",
            "-arch",
            arch,
            self.binary,
            PATH=f"{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}",
        )
        for part in listing.split("Function : ")[1:]:
            name, _, code = part.partition("\n")
            yield name.strip(), code


@pytest.fixture(scope="module")
def cuda_code(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], CudaCode]:
    """Each source compiled once."""
    folder = tmp_path_factory.mktemp("cuda")
    return cache(lambda source: CudaCode(source, folder))


@needs("nvcc")
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_kernels_compile_and_do_not_spill(source: Path, cuda_code: Callable[[Path], CudaCode]) -> None:
    spills = "\n".join(f"{most} bytes: {name}" for name, most in spilled(cuda_code(source).report).items())
    assert not spills, subprocess.run(["c++filt"], input=spills, capture_output=True, text=True).stdout


@needs("nvcc", "triton")
def test_the_packed_linf_step_reads_16_bytes_at_a_time(cuda_code: Callable[[Path], CudaCode]) -> None:
    code = cuda_code(ROOT / "csrc" / "cuda" / LINF)
    for arch in ARCHS:
        packed = [sass for name, sass in code.functions(arch) if "pgd_step_linf_kernelIffLi4E" in name]
        assert len(packed) == 1
        loads = re.findall(r"\bLDG\.E\S*", packed[0])
        sizes = [load for load in loads if ".64" in load]  # step size and radius, once per thread
        assert len(sizes) == 2
        assert len(loads) >= 3 + len(sizes)
        assert all(".128" in load for load in loads if load not in sizes), loads
