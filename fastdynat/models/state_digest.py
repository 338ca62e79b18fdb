"""A digest of a network's weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def state_digest(state: Mapping[str, object]) -> str:
    """Return the sha256 of a state dict: names, dtypes, shapes and values, in the order of the names.

    Extra state that is no tensor counts by its `repr`. Runs store this digest (`init_sha256`): its format
    must not change.
    """
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{key} {value!r}".encode())
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
