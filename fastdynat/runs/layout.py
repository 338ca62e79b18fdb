"""Names of files in a run directory, and the tests that recognise one."""

import os
import re
from pathlib import Path

from fastdynat.documents import open_file
from fastdynat.errors import UserError

CONFIG, ENVIRONMENT, STATE = "config.yaml", "environment.json", "state.pt"
LAST, BEST, CHECKPOINTS, LOCK = "last", "best", "checkpoints", ".lock"
METRICS, TABLE = "metrics.jsonl", "metrics.csv"
EVALUATIONS, BOUNDARY, TENSORBOARD = "evaluations", "boundary", "tensorboard"
HEADER = "# fastdynat run"  # first line of a run's configuration
# Everything that a run keeps in its folder, beside its configuration.
OWNED = (ENVIRONMENT, METRICS, TABLE, LAST, BEST, BOUNDARY, EVALUATIONS, TENSORBOARD, CHECKPOINTS)

# Files that training writes into the folder of a checkpoint.
IN_CHECKPOINT = re.compile(r"(model|model_raw|guide)\.(safetensors|json)|state\.pt|checkpoint\.json")
# File names that only this program gives, by folder.
MADE = {
    BOUNDARY: re.compile(r"epoch-[0-9]{4,}\.npz"),
    EVALUATIONS: re.compile(r"[a-z0-9_-]+(\.[0-9]+of[0-9]+)?-[0-9a-f]{16}\.(json|state)"),
    TENSORBOARD: re.compile(r"events\.out\.tfevents\.[0-9]+\..+"),
}
IN_RUN = (
    CONFIG,
    LOCK,
    ENVIRONMENT,
    METRICS,
    TABLE,
    LAST,
    BEST,
    CHECKPOINTS,
    BOUNDARY,
    EVALUATIONS,
    TENSORBOARD,
)


def real(path: Path) -> Path:
    """`path` with links followed. Unlike `Path.resolve`, never raises where links form a circle."""
    return Path(os.path.realpath(path))


def run_of_file(path: Path) -> Path | None:
    """The run that the file `path` belongs or would belong to, links followed; None for other files."""
    place = real(path)
    for run in place.parents[:3]:
        inside = place.relative_to(run).parts
        made = MADE.get(inside[0], IN_CHECKPOINT)
        of_run = inside[0] in IN_RUN and (len(inside) == 1 or made.fullmatch(inside[-1]))
        if of_run and looks_like_run(run):
            return run
    return None


def looks_like_run(path: Path | str) -> bool:
    """True if `path` holds a config.yaml that a run wrote; other tools write files of this name too."""
    return is_run_config(Path(path) / CONFIG)


def is_run_config(file: Path) -> bool:
    """True if `file` is a configuration that a run wrote, in its folder or copied from there."""
    return _first_lines(file, 1)[0].rstrip() == HEADER.encode()


def require_run(path: Path | str) -> None:
    """Raise UserError unless `path` is a run directory."""
    path = Path(path)
    if not os.path.exists(path):  # False, not an error, where a parent may not be entered
        raise UserError(f"no run at {path}")
    if not looks_like_run(path):
        if _is_forbidden(path / CONFIG):
            raise UserError(f"cannot read {path / CONFIG}: Permission denied")
        raise UserError(f"{path} is not a run directory: it has no {CONFIG} written by fastdynat")


def _is_forbidden(path: Path) -> bool:
    """True if this user lacks the permission to read `path`."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def run_id(path: Path) -> str | None:
    """The run's id in its configuration, which its checkpoints name too; None for versions without ids."""
    match = re.fullmatch(rb"# id: ([0-9a-f]{16})\s*", _first_lines(path / CONFIG, 2)[1])
    return match[1].decode() if match else None


def _first_lines(file: Path, count: int) -> list[bytes]:
    """The first `count` lines of `file`, at most 200 bytes each; empty if unreadable."""
    try:
        with open_file(file) as opened:
            return [opened.readline(200) for _ in range(count)]
    except (OSError, UserError):
        return [b""] * count


def new_id() -> str:
    """An id for a new run."""
    return os.urandom(8).hex()


def config_text(config: str, identity: str | None) -> str:
    """The content of a run's configuration file."""
    return "\n".join([HEADER, *([] if identity is None else [f"# id: {identity}"]), config])
