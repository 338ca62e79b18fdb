"""`fastdynat doctor --check`: every operator implementation compared with eager again, and timed."""

import importlib
import json as json_module
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from fastdynat import verification as verified
from fastdynat.machine import copy_bandwidth
from fastdynat.ops import available_backends
from fastdynat.terminal.progress import ProgressDisplay, ProgressTask
from fastdynat.verification import REFERENCE, OperatorCheck
from fastdynat.verification.isolated_run import on_own_thread

Status = Literal["right", "wrong", "missing", "reference"]
STYLES = {"right": "green", "wrong": "red", "missing": "", "reference": ""}
SECONDS = 0.1  # of timing, for each operator
REGISTER = ("fastdynat.ops.checks",)  # the modules that register checks


@dataclass(frozen=True, slots=True)
class OperatorRow:
    """An implementation of an operator on a device.

    Attributes:
        detail: the case and the deviation of a wrong one, the reason for a missing one.
        milliseconds: per call of `timed`; None where it is not timed.
        share: of the bandwidth of a copy, taking one pass over memory as ideal; on a GPU only.
    """

    operator: str
    implementation: str
    device: str
    status: Status
    detail: str = ""
    timed: str = ""
    milliseconds: float | None = None
    share: float | None = None


def devices() -> list[torch.device]:
    """The current GPU, if there is one, and the CPU."""
    gpu = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    return [*gpu, torch.device("cpu")]


def check_operators_on(device: torch.device, task: ProgressTask) -> list[OperatorRow]:
    """Check and time all that is registered on `device`, whatever earlier verdicts say; `task` counts them.

    Raises DeviceLost where a kernel breaks the CUDA context; the next call leaves it out.
    """
    bandwidth = on_own_thread(lambda: copy_bandwidth(device)) if device.type == "cuda" else None
    rows = []
    for check in verified.registered().values():
        task.update(title=f"{check.name} on {device}")
        rows += _rows(check, device, bandwidth)
        task.advance(1)
    return rows


def check_all(display: ProgressDisplay) -> list[OperatorRow]:
    """The rows of every device, by operator; what can run on one of them is not missing on another."""
    for module in REGISTER:
        importlib.import_module(module)
    total = len(verified.registered()) * len(devices())
    with display.task("operators", total, unit="operators") as task:
        rows = [row for device in devices() for row in check_operators_on(device, task)]
    present = {(row.operator, row.implementation) for row in rows if row.status in ("right", "wrong")}
    kept: dict[tuple[str, ...], OperatorRow] = {}
    for row in rows:
        name = (row.operator, row.implementation)
        if row.status != "missing":
            kept[(*name, row.device)] = row
        elif name not in present:
            why = available_backends().get(row.implementation) or row.detail
            kept.setdefault(name, replace(row, device="", detail=why))
    order = list(verified.registered())
    return sorted(kept.values(), key=lambda row: order.index(row.operator))


def _rows(check: OperatorCheck, device: torch.device, bandwidth: float | None) -> list[OperatorRow]:
    missing = {name: check.why_not(name, device) for name in check.candidates}
    found = verified.verdicts(check.name, device, afresh=True) if None in missing.values() else {}
    size, seconds = (
        _times(check, device, [name for name, verdict in found.items() if verdict.right])
        if found
        else ("", {})
    )

    def row(name: str, status: Status, detail: str = "") -> OperatorRow:
        if name not in seconds or check.timed is None:
            return OperatorRow(check.name, name, str(device), status, detail)
        share = None if bandwidth is None else check.timed().bytes / seconds[name] / bandwidth
        return OperatorRow(check.name, name, str(device), status, detail, size, 1000 * seconds[name], share)

    rows = [row(REFERENCE, "reference")]
    for name, why_not in missing.items():
        if why_not is not None:
            rows.append(row(name, "missing", why_not))
        else:
            verdict = found[name]
            rows.append(
                row(name, "right")
                if verdict.right
                else row(name, "wrong", verified.describe_verdict(verdict))
            )
    return rows


def _times(check: OperatorCheck, device: torch.device, right: list[str]) -> tuple[str, dict[str, float]]:
    """The name of the timed call, and the seconds of the reference and of those that are `right`."""
    if check.timed is None:
        return "", {}
    timing = check.timed()

    def run() -> dict[str, float]:
        with check.within():
            args = timing.make(device)
            calls: dict[str, Callable[[], Any]] = {
                name: partial(check.candidates[name], *args) for name in right
            }
            return verified.timed(calls | {REFERENCE: partial(check.reference, *args)}, device, SECONDS)

    return timing.name, on_own_thread(run)


def operators_json(rows: list[OperatorRow]) -> str:
    """The rows as a JSON list of objects."""
    return json_module.dumps([asdict(row) for row in rows], indent=2)


def print_operators(rows: list[OperatorRow]) -> None:
    """Print the rows, an operator after the other."""
    from rich import box
    from rich.text import Text

    from fastdynat.terminal.consoles import AS_IS, PlainTable, output_console

    table = PlainTable(box=box.SIMPLE)
    for column in ("operator", "implementation", "on", "", "ms", "of a copy"):
        table.add_column(column, justify="right" if column in ("ms", "of a copy") else "left", no_wrap=True)
    table.add_column("call that was timed, or the deviation, or why it is missing", overflow="fold")
    previous = ""
    for row in rows:
        time = "" if row.milliseconds is None else f"{row.milliseconds:.3f}"
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        operator = row.operator if row.operator != previous else ""
        previous = row.operator
        cells = [operator, row.implementation, row.device, row.status, time, share, row.detail or row.timed]
        table.add_row(*(Text(cell, style=STYLES[row.status] if cell is cells[3] else "") for cell in cells))
    console = output_console()
    console.print(table)
    wrong = [f"{row.operator} ({row.implementation}, {row.device})" for row in rows if row.status == "wrong"]
    built = sum(row.status in ("right", "wrong") for row in rows)
    console.print(
        f"Wrong and left out: {', '.join(wrong)}." if wrong else f"All {built} implementations are right.",
        **AS_IS,
    )


def report_operators(*, json: bool, display: ProgressDisplay) -> int:
    """Check all operators and print a table or JSON.

    Returns the exit code: 1 where an implementation that is built is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table names wrong implementations
        rows = check_all(display)
    if json:
        print(operators_json(rows))
    else:
        print_operators(rows)
    return int(any(row.status == "wrong" for row in rows))
