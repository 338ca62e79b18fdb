"""Log messages on the terminal, and what a library user is left."""

import logging
import subprocess
import sys

import pytest

from fastdynat.terminal.consoles import error_console, output_console
from fastdynat.terminal.messages import MessageCollector, messages_shown

LOGGER = logging.getLogger("fastdynat.training.start")


def log_all() -> None:
    for level in ("debug", "info", "warning", "error"):
        getattr(LOGGER, level)("10 %% of [bold]%s[/bold] :smile:", level)


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        ("debug", ["debug: ", "", "warning: ", "error: "]),
        ("info", ["", "warning: ", "error: "]),
        ("warning", ["warning: ", "error: "]),
        ("error", ["error: "]),
    ],
)
def test_messages_are_plain_lines_from_a_level_on(
    level: str, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with messages_shown(error_console(), level):
        log_all()
    names = ("debug", "info", "warning", "error")[-len(lines) :]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{mark}10 % of [bold]{name}[/bold] :smile:" for mark, name in zip(lines, names, strict=True)
    ]


def test_long_messages_are_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 200
    with messages_shown(output_console()):
        LOGGER.info(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_level_and_handlers_are_put_back() -> None:
    package = logging.getLogger("fastdynat")
    before = package.level, list(package.handlers)
    with pytest.raises(KeyError), messages_shown(error_console(), "debug"):
        raise KeyError
    with MessageCollector():
        pass
    assert (package.level, list(package.handlers)) == before


def test_collected_messages_do_not_depend_on_the_printed_level(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_shown(error_console(), "error"), MessageCollector() as heard:
        log_all()
    assert len(heard.texts) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_library_sets_no_level_and_no_handler_but_a_null_one() -> None:
    code = """
import logging, fastdynat
import fastdynat.training.start
logger = logging.getLogger("fastdynat")
assert [type(handler) for handler in logger.handlers] == [logging.NullHandler], logger.handlers
assert logger.level == logging.NOTSET and logger.propagate
names = [name for name in logging.root.manager.loggerDict if name.startswith("fastdynat.")]
assert names
for name in names:
    child = logging.getLogger(name)
    assert not child.handlers and child.level == logging.NOTSET and child.propagate, name
child.warning("not printed")
logging.basicConfig(format="%(name)s %(message)s")
logging.getLogger("fastdynat.training.start").warning("printed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "fastdynat.training.start printed\n"
