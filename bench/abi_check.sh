#!/usr/bin/env bash
# One binary in two versions of torch: builds fastdynat._C against the oldest torch that is supported and runs the operators'
# tests with that very file there and in the newest torch that pip finds. Triton, which comes with torch, compiles its kernels too.
#
#   bench/abi_check.sh [RESULT.json]      default: bench/results/abi.json
#
# Takes the commit that is checked out, not what differs from it. OLDEST and NEWEST are what pip is asked for; FASTDYNAT_CUDA as
# in setup.py, by default without the CUDA half. Needs a C++ compiler, and several gigabytes for two environments.
set -euo pipefail
cd "$(dirname "$0")/.."
result=$(realpath -m "${1:-bench/results/abi.json}")
export FASTDYNAT_CUDA=${FASTDYNAT_CUDA:-0} FASTDYNAT_EXT=1 FASTDYNAT_REQUIRE=ext,triton,cxx
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree"
git archive HEAD | tar -x -C "$work/tree"
commit=$(git rev-parse HEAD)
cd "$work/tree"

for name in oldest newest; do
  "${PYTHON:-python3}" -m venv "$work/$name"
  [ "$name" = oldest ] && torch=${OLDEST:-torch==2.11.*} || torch=${NEWEST:-torch}
  "$work/$name/bin/pip" install --quiet "$torch" 'setuptools>=77' ninja numpy pytest hypothesis
done

PATH="$work/oldest/bin:$PATH" "$work/oldest/bin/python" setup.py --quiet build_ext --inplace
rm -rf build
for name in oldest newest; do
  echo "== $name: $("$work/$name/bin/python" -c 'import torch; print("torch", torch.__version__)')"
  sha256sum fastdynat/_C*.so | tee "$work/$name.sha256"
  "$work/$name/bin/python" -m pytest -q -p no:cacheprovider --junitxml="$work/$name.xml" tests/ops || echo "== $name: failed"
  "$work/$name/bin/python" - "$work/$name.sha256" "$work/$name.xml" >"$work/$name.json" <<'PYTHON'
import json
import platform
import sys
from importlib.metadata import version
from xml.etree import ElementTree

import torch

import fastdynat._C

sha256, file = open(sys.argv[1]).read().split()
assert fastdynat._C.__file__.endswith(file), fastdynat._C.__file__
suite = ElementTree.parse(sys.argv[2]).getroot().find("testsuite")
counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
versions = {"torch": torch.__version__, "triton": version("triton"), "python": platform.python_version()}
print(json.dumps({"sha256": sha256, "with_cuda": bool(fastdynat._C.WITH_CUDA)} | versions | counts))
PYTHON
  cat "$work/$name.json"
done

"$work/oldest/bin/python" - "$commit" "$work/oldest.json" "$work/newest.json" "$result" <<'PYTHON'
import json
import sys
from pathlib import Path

commit, oldest, newest, result = sys.argv[1:]
runs = [json.loads(Path(path).read_text()) for path in (oldest, newest)]
assert runs[0]["sha256"] == runs[1]["sha256"]
same = {key: runs[0][key] for key in ("sha256", "with_cuda")}
for run in runs:
    for key in same:
        del run[key]
about = {"commit": commit, "built_with": f"torch {runs[0]['torch']}", **same, "runs": runs}
Path(result).parent.mkdir(parents=True, exist_ok=True)
Path(result).write_text(json.dumps(about, indent=2) + "\n")
print(f"written: {result}")
sys.exit(any(run["failures"] or run["errors"] or not run["tests"] > run["skipped"] for run in runs))
PYTHON
