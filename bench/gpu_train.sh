#!/usr/bin/env bash
# A real training on one bare GPU machine without a network, in under 9 minutes. See gpu_train.py beside this.
#
#     bench/gpu_train.sh FOLDER [TARGET [FLAGS...]]
exec "${PYTHON:-python3}" -u "$(dirname "$0")/gpu_train.py" "$@"
