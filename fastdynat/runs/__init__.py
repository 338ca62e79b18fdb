"""Run directories: layout, checkpoints, weights, and the record of each start."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.runs.environment import describe_environment, record_start
    from fastdynat.runs.failures import WriteError
    from fastdynat.runs.find import find_checkpoint, newest_checkpoint
    from fastdynat.runs.layout import BEST, CONFIG, ENVIRONMENT, LAST, STATE, looks_like_run, require_run
    from fastdynat.runs.manifest import check_manifest
    from fastdynat.runs.output_checks import check_output, check_results, check_writable
    from fastdynat.runs.rundir import RunDir, check_new, claim_name, free_name, lock_folder, release_name
    from fastdynat.runs.seen_run import SeenRun, marked_folder, require_shared
    from fastdynat.runs.sidecar import Sidecar, read_sidecar
    from fastdynat.runs.source import code_version, package_digest, source_commit
    from fastdynat.runs.weights import (
        check_test_images,
        data_difference,
        guide_weights,
        load_checkpoint,
        load_into,
        load_network,
        load_state,
        save_weights,
    )

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "find": (
            "find_checkpoint",
            "newest_checkpoint",
        ),
        "environment": (
            "describe_environment",
            "record_start",
        ),
        "failures": ("WriteError",),
        "output_checks": ("check_output", "check_results", "check_writable"),
        "layout": (
            "BEST",
            "CONFIG",
            "ENVIRONMENT",
            "LAST",
            "STATE",
            "looks_like_run",
            "require_run",
        ),
        "manifest": ("check_manifest",),
        "rundir": (
            "RunDir",
            "check_new",
            "claim_name",
            "free_name",
            "lock_folder",
            "release_name",
        ),
        "seen_run": ("SeenRun", "marked_folder", "require_shared"),
        "sidecar": ("Sidecar", "read_sidecar"),
        "source": ("code_version", "package_digest", "source_commit"),
        "weights": (
            "check_test_images",
            "data_difference",
            "guide_weights",
            "load_checkpoint",
            "load_network",
            "load_state",
            "load_into",
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
    "SeenRun",
    "Sidecar",
    "WriteError",
    "check_manifest",
    "check_new",
    "check_output",
    "check_results",
    "check_test_images",
    "check_writable",
    "claim_name",
    "code_version",
    "data_difference",
    "describe_environment",
    "find_checkpoint",
    "free_name",
    "guide_weights",
    "load_checkpoint",
    "load_into",
    "load_network",
    "load_state",
    "lock_folder",
    "looks_like_run",
    "marked_folder",
    "newest_checkpoint",
    "package_digest",
    "read_sidecar",
    "record_start",
    "release_name",
    "require_run",
    "require_shared",
    "save_weights",
    "source_commit",
]
