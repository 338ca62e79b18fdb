#!/usr/bin/env bash
# Time to a robust accuracy: trains CIFAR-10 (JPEG) until the validation PGD-10 accuracy reaches TARGET.
#
#     FASTDYNAT_CIFAR10_JPEG=cifar10-jpeg bench/gpu_train.sh FOLDER [TARGET [FLAGS...]]
#
# TARGET is a share (default 0.45); FLAGS go to `fastdynat train`. Writes time_to_accuracy.json, train.log, the metrics and the
# best weights into FOLDER, which `bench/autoattack.py FOLDER --checkpoint best --num-images 10000` then attacks; after
# FASTDYNAT_TRAIN_SECONDS (default 560) the run is stopped, and what it reached is reported. The exit status is 0 if the target
# was reached. FASTDYNAT_GPU_CHECK_DEVICE=cpu trains a tiny network on digits, to test this script.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
[ $# -ge 1 ] || { echo "usage: bench/gpu_train.sh FOLDER [TARGET [FLAGS...]]" >&2; exit 2; }
out=$1 target=${2:-0.45}
shift $(($# > 2 ? 2 : $#))
device=${FASTDYNAT_GPU_CHECK_DEVICE:-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd)
run=$(mktemp -d)/run
trap 'rm -rf "$(dirname "$run")"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [ "$device" = cpu ]; then
  flags=(--train-size 200 --batch-size 50 --epochs 3 --steps 2)
else
  : "${FASTDYNAT_CIFAR10_JPEG:?names the image folder with train/ and test/}"
  flags=(--data imagefolder --data-dir "$FASTDYNAT_CIFAR10_JPEG" --model resnet18 --amp --compile --epochs 30 --schedule onecycle)
fi
begin=$(date +%s.%N)
# SIGTERM: the trainer saves what it has.
timeout --kill-after=30 "${FASTDYNAT_TRAIN_SECONDS:-560}" python -m fastdynat train --run-dir "$run" --device "$device" \
  --stop-at "$target" "${flags[@]}" "$@" 2>&1 | tee "$out/train.log"
end=$(date +%s.%N)
cp "$run/metrics.jsonl" "$run/config.yaml" "$out/" || exit 1
rm -rf "$out/best"
cp -rL "$run/best" "$out/best" && rm -f "$out/best/state.pt"
python bench/time_to_accuracy.py "$run" --wall "$(echo "$end $begin" | awk '{print $1 - $2}')" --json "$out/time_to_accuracy.json"
