#!/usr/bin/env bash
# Everything that needs a GPU, on one bare machine without a network, in under 9 minutes. See gpu_check.py beside this.
#
#     bench/gpu_check.sh [FOLDER]          bench/gpu_check.sh --pack [PACK]          bench/gpu_check.sh --help
exec "${PYTHON:-python3}" -u "$(dirname "$0")/gpu_check.py" "$@"
