#!/usr/bin/env bash
# Attack and training step of a ViT and a ConvNeXt on 64-pixel images, beside torchattacks and the released loop in plain PyTorch,
# in float32 and in bf16 where the machine has it; peak memory and time of the step with and without --grad-checkpointing.
#
#   bench/transformers.sh [FOLDER]        default: bench/results
#
# Writes FOLDER/vit_tiny_cpu.json and FOLDER/convnext_atto_cpu.json. Needs the extras timm and peer, and a quiet machine.
# BATCH, STEPS, SIZE, REPEATS and ROOM (more flags of `fastdynat bench`) change the size.
set -euo pipefail
folder=${1:-$(dirname "$0")/results}
flags=(--data cifar10 --image-size "${SIZE:-64}" --batch-size "${BATCH:-16}" --steps "${STEPS:-10}" --repeats "${REPEATS:-5}")
for network in vit_tiny_patch16_224 convnext_atto; do
  name=${network/_patch16_224/}
  # --amp takes bf16 where it is fast, and --peers times float32 beside it.
  fastdynat bench --model "timm:$network" --guide "timm:$network" "${flags[@]}" --amp --peers --grad-checkpointing \
    ${ROOM:-} --json "$folder/${name}_cpu.json"
done
