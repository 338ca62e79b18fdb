"""Pytest plugin: runs a share of the tests, and logs their begin and end, so that killed runs tell more.

Used by bench/gpu/shards.py. FASTDYNAT_SHARD=K/N takes every N-th test from the K-th on, without those that
FASTDYNAT_OUTCOMES, the file of lines, already has.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROKEN = 75
LINES = Path(os.environ["FASTDYNAT_OUTCOMES"])
WHY = 300  # characters of an error that are kept


def note(**event: Any) -> None:
    """Add a line: one write, so that a kill leaves no half of it behind another."""
    with LINES.open("a") as file:
        file.write(json.dumps(event) + "\n")


def known() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


@pytest.hookimpl(trylast=True)  # after -m has left out what it does
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, number = map(int, os.environ["FASTDYNAT_SHARD"].split("/"))
    before = known()
    done = {event["test"] for event in before if event["event"] == "outcome"}
    mine = items[index::number]
    if not any(event["event"] == "collected" for event in before):
        note(event="collected", count=len(mine))
    items[:] = [item for item in mine if item.nodeid not in done]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported: one process reports it, the others go on without it."""
    if report.failed and os.environ["FASTDYNAT_SHARD"].startswith("0/"):
        note(
            event="not collected",
            test=report.nodeid,
            outcome="error",
            why=str(report.longrepr).strip()[-WHY:],
        )


def pytest_runtest_logstart(nodeid: str) -> None:
    note(event="start", test=nodeid, at=time.time())


class Watch:
    """The outcome of the test in hand: the worst of its setup, call and teardown."""

    def __init__(self) -> None:
        self.outcome, self.why, self.seconds = "passed", "", 0.0

    def add(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed:
            self.outcome = "failed" if report.when == "call" else "error"
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why = str(crash.message if crash is not None else report.longrepr)[:WHY]
        elif report.skipped and self.outcome == "passed":
            self.outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            self.why = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[
                :WHY
            ]


watch = Watch()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    watch.add(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global watch
    watch = Watch()
    result = yield
    note(
        event="outcome",
        test=item.nodeid,
        outcome=watch.outcome,
        seconds=round(watch.seconds, 2),
        why=watch.why,
    )
    if watch.outcome in ("failed", "error") and _device_lost():
        note(event="device lost", test=item.nodeid)
        os._exit(BROKEN)
    return result


def _device_lost() -> bool:
    """True if every later call to the GPU fails in this process after such an error."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
