#!/usr/bin/env bash
# Everything about the operators that needs a GPU, in under 9 minutes: build, tests, compute-sanitizer, timings.
#
#     bench/gpu_check.sh [FOLDER]
#
# Writes the logs and operators_gpu.json into FOLDER (default bench/results) and prints the table. Each part has a limit of its
# own, a part that fails does not keep the next from running, and the exit status says whether one failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0

part() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begin=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
  echo "== $name: status $status, $((SECONDS - begin)) s"
  [ "$status" -eq 0 ] || failed=1
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader || exit 1
architecture=$(python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
part build 120 env FASTDYNAT_EXT=1 FASTDYNAT_CUDA=1 TORCH_CUDA_ARCH_LIST="$architecture" MAX_JOBS=8 \
  python setup.py build_ext --inplace
part doctor 30 python -m fastdynat doctor
part tests 180 python -m pytest -m gpu -q -p no:cacheprovider tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python -m pytest -m gpu -q -x -p no:cacheprovider tests/test_ops*.py -k "cuda and float32"
  done
else
  echo "== no compute-sanitizer on PATH: not checked"
fi
LINES_SHOWN=60 part operators 150 python bench/operators.py --json "$out/operators_gpu.json"
exit "$failed"
