"""Run directories: layout, weights and the record of where a run ran."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.runs.environment import describe_environment, record_start, source_commit
    from fastdynat.runs.files import check_writable
    from fastdynat.runs.manifest import check_manifest
    from fastdynat.runs.rundir import (
        BEST,
        CONFIG,
        ENVIRONMENT,
        LAST,
        STATE,
        RunDir,
        check_new,
        free_name,
        lock,
        looks_like_run,
        require_run,
    )
    from fastdynat.runs.weights import (
        Sidecar,
        foreign,
        guide_weights,
        load_checkpoint,
        load_network,
        load_state,
        put_state,
        read_sidecar,
        save_weights,
    )

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "environment": (
            "describe_environment",
            "record_start",
            "source_commit",
        ),
        "files": ("check_writable",),
        "manifest": ("check_manifest",),
        "rundir": (
            "BEST",
            "CONFIG",
            "ENVIRONMENT",
            "LAST",
            "STATE",
            "RunDir",
            "check_new",
            "free_name",
            "lock",
            "looks_like_run",
            "require_run",
        ),
        "weights": (
            "Sidecar",
            "foreign",
            "guide_weights",
            "load_checkpoint",
            "load_network",
            "load_state",
            "put_state",
            "read_sidecar",
            "save_weights",
        ),
    },
)

__all__ = [
    "BEST",
    "CONFIG",
    "ENVIRONMENT",
    "LAST",
    "STATE",
    "RunDir",
    "Sidecar",
    "check_manifest",
    "check_new",
    "check_writable",
    "describe_environment",
    "foreign",
    "free_name",
    "guide_weights",
    "load_checkpoint",
    "load_network",
    "load_state",
    "lock",
    "looks_like_run",
    "put_state",
    "read_sidecar",
    "record_start",
    "require_run",
    "save_weights",
    "source_commit",
]
