"""csrc/ under AddressSanitizer and UBSan: the CPU kernels, and the CUDA kernels in the simulator.

The calls are in sanitized_calls.py. Torch itself is not sanitized, but its memory is: the sanitizer's malloc
fences tensors.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, needs
from support import cuda_sim

pytestmark = needs("cxx")
# Without optimisation, which would remove some errors and takes as long again to compile.
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
READ = 'extern "C" __attribute__((visibility("default"))) int read(const int* p, long i) { return p[i]; }\n'


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # The C++ library as well: the sanitizer looks for its functions at once, and Python itself does not load
    # it.
    preload = [
        cuda_sim.run(cuda_sim.compiler(), f"-print-file-name={name}").strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(path).is_absolute() for path in preload):
        pytest.skip(f"this compiler has no libasan.so: {preload}")
    env = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        # New memory is full of 0xbe, so that a tensor which is not written shows.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000000:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",  # parallel_for as well
    }
    script = ROOT / "tests" / "support" / "sanitized_calls.py"
    return subprocess.run(
        [sys.executable, script, *arguments], env=env, capture_output=True, text=True, timeout=600
    )


def test_every_operator_is_clean(compiled: Path) -> None:
    cpu = [(path, SANITIZE) for path in sorted(cuda_sim.CSRC.glob("*.cpp")) if path.name != "module.cpp"]
    done = run(
        cuda_sim.build(compiled, "sanitized", cpu, SANITIZE), cuda_sim.build_kernels(compiled, SANITIZE)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.splitlines()[-1] == "clean", done.stdout


def test_the_sanitizer_watches_torchs_memory(compiled: Path, tmp_path: Path) -> None:
    source = tmp_path / "read.cpp"
    source.write_text(READ)
    done = run("--read-past-the-end", cuda_sim.build(compiled, "read", [(source, SANITIZE)], SANITIZE))
    assert "within: 63" in done.stdout, done.stderr[-3000:]
    assert "past the end" not in done.stdout
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
