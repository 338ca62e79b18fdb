#!/usr/bin/env bash
# Everything that needs a GPU, on one machine without a network, in under 9 minutes: build, tests, timings, a training.
#
#     bench/gpu_check.sh [FOLDER]
#
# Writes a log per part and the JSON files into FOLDER (default bench/results). Each part has a limit of its own and none runs
# past the whole's, a part that fails does not keep the next from running, and the exit status says whether one failed.
# FASTDYNAT_CIFAR10_JPEG names CIFAR-10 as an image folder, to train on instead of the embedded digits.
# FASTDYNAT_GPU_CHECK_DEVICE=cpu runs the same parts at tiny sizes, to test this script.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-bench/results}
device=${FASTDYNAT_GPU_CHECK_DEVICE:-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd)
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
TOTAL=535 failed=0

part() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  [ "$limit" -le $((TOTAL - SECONDS)) ] || limit=$((TOTAL - SECONDS))
  echo "== $name"
  if [ "$limit" -lt 5 ]; then
    echo "== $name: not run, out of time"
    failed=1
    return
  fi
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
  echo "== $name: status $status, $((SECONDS - begin)) s"
  [ "$status" -eq 0 ] || failed=1
}

state() {
  [ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu,power.draw --format=csv,noheader
}

bench() {  # NAME SECONDS BUDGET FLAGS...
  local name=$1 limit=$2 budget=$3
  shift 3
  LINES_SHOWN=200 part "$name" "$limit" python -m fastdynat bench --device "$device" "${sizes[@]}" --budget "$budget" \
    --json "$out/$name.json" "$@"
}

train() {  # NAME FLAGS...
  local name=$1
  shift
  part "train-$name" 60 python -m fastdynat train --device "$device" --run-dir "$runs/$name" "${data[@]}" "$@"
  [ ! -f "$runs/$name/metrics.jsonl" ] || cp "$runs/$name/metrics.jsonl" "$out/train-$name.jsonl"
}

data=(--epochs 3)
evaluated=() loaders=(--rounds 3)
if [ -n "${FASTDYNAT_CIFAR10_JPEG:-}" ] && [ "$device" != cpu ]; then
  data=(--data imagefolder --data-dir "$FASTDYNAT_CIFAR10_JPEG" --model resnet18 --guide resnet18 --train-size 10000 --epochs 2)
  evaluated=(--num-images 1000)
  loaders+=(--data-dir "$FASTDYNAT_CIFAR10_JPEG")
fi
if [ "$device" = cpu ]; then
  r18=small wrn=small compile=off operators=(--only soft_margin)
  sizes=(--batch-size 8 --steps 2 --repeats 1)
  data=(--epochs 1 --train-size 60 --val-size 20 --batch-size 20 --steps 1)
  evaluated=(--num-images 20)
  loaders=(--rounds 1 --num-images 1000)
  build=(env FASTDYNAT_CUDA=0 python setup.py build_ext --inplace)
  export FASTDYNAT_BENCH_DEVICE=cpu FASTDYNAT_BENCH_SECONDS=0.05
else
  state || exit 1
  r18=resnet18 wrn=wrn-34-10 compile=default operators=()
  sizes=(--batch-size 128 --seconds 1)
  architecture=$(python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  build=(env FASTDYNAT_EXT=1 FASTDYNAT_CUDA=1 "TORCH_CUDA_ARCH_LIST=$architecture" MAX_JOBS=8 python setup.py build_ext --inplace)
  export FASTDYNAT_BENCH_SECONDS=0.2
fi
guide=$([ "$r18" = small ] && echo small || echo resnet18_s1122)

part build 120 "${build[@]}"
part doctor 30 python -m fastdynat doctor
part tests 120 python -m pytest -m gpu -q -p no:cacheprovider tests
bench bench-resnet18-guide-s1122 110 60 --model "$r18" --guide "$guide" --amp --compile "$compile" --peers --switches
bench bench-resnet18-guide-resnet18 80 40 --model "$r18" --guide "$r18" --amp --compile "$compile" --peers --switches
bench bench-wrn-34-10 70 30 --model "$wrn" --guide "$guide" --amp --compile "$compile"
state
train fast --amp --compile "$compile"
train plain --amp off --compile off --channels-last off --fold off --no-closed-form --graphs off --guide-stream off --kernels eager
part eval 40 python -m fastdynat eval "$runs/fast" "$runs/plain" --device "$device" --checkpoints last --attacks clean,pgd20 \
  "${evaluated[@]}" --json "$out/train.json"
if command -v compute-sanitizer >/dev/null && [ "$device" != cpu ]; then
  for tool in memcheck racecheck; do
    part "sanitizer-$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python -m pytest -m gpu -q -x -p no:cacheprovider tests/test_ops*.py -k "cuda and float32"
  done
else
  echo "== no compute-sanitizer: not checked"
fi
LINES_SHOWN=60 part operators 90 python bench/operators.py "${operators[@]}" --json "$out/operators_$device.json"
LINES_SHOWN=30 part dyart-cost 60 python bench/dyart_cost.py --rounds 3 --json "$out/dyart_cost_$device.json"
LINES_SHOWN=30 part loaders 40 python bench/loaders.py "${loaders[@]}" --json "$out/loaders_$device.json"
state
exit "$failed"
