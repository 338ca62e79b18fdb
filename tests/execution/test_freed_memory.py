"""Freed memory stays with the process: counted by the pages that the system has to give again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS, BYTES = 60, 48 << 20
SCRIPT = f"""
import resource
from fastdynat import keep_freed_memory
kept = keep_freed_memory() if {{keep}} else None
import torch
torch.empty({BYTES}, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    torch.empty({BYTES}, dtype=torch.uint8).fill_(1)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*, keep: bool, **variables: str) -> tuple[str, int]:
    """What `keep_freed_memory` returned, and the pages given while blocks are allocated, filled and freed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    for name in ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD"):
        kept.pop(name, None)
    words = [sys.executable, "-c", SCRIPT.format(keep=keep)]
    done = subprocess.run(words, env={**kept, **variables}, capture_output=True, text=True, check=True)
    said, pages = done.stdout.split()
    return said, int(pages)


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


@GLIBC
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages are of 2 MiB")
def test_blocks_are_used_again() -> None:
    said, given = run(keep=True)
    assert said == "True"
    block = BYTES // os.sysconf("SC_PAGE_SIZE")
    # What is kept beside them may take a part of a block's place: up to ten more blocks are new, by chance,
    # in however many rounds.
    assert given < ROUNDS * block // 2 < run(keep=False)[1]


@GLIBC
@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, True),
    ],
)
def test_what_the_user_has_set_stays(variables: dict[str, str], kept: bool) -> None:
    assert run(keep=True, **variables)[0] == str(kept)
