"""Fuzzing by hand: ``PYTHONPATH=tests python -m fuzz --examples 1000 --kinds runs,yaml``; exits 0 or 1."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fuzz.base import make_base
from fuzz.cases import SHARES, STRATEGIES
from fuzz.harness import Tally
from fuzz.search import search

parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
parser.add_argument("--examples", type=int, default=300, help="inputs of all kinds together")
parser.add_argument("--kinds", default=",".join(STRATEGIES))
arguments = parser.parse_args()
kinds = arguments.kinds.split(",")
tally, begin = Tally(), time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    base = make_base(Path(folder))
    print(f"base made in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for kind in kinds:
        start = time.perf_counter()
        search(kind, base, -(-arguments.examples * SHARES[kind] // sum(SHARES[k] for k in kinds)), tally)
        print(f"{kind}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        print(tally.table(), flush=True)
sys.exit(1 if tally.failures else 0)
