"""Progress: what it writes on a terminal and in a log, and how often."""

import io

import pytest

from gatelet.convert import progress as module
from gatelet.convert.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(stream, clock, seconds, steps=10):
    progress = Progress(stream=stream)
    for _ in progress.phase("calibrate", range(steps)):
        clock[0] += seconds / steps
    return stream.getvalue()


def test_a_log_gets_a_line_every_thirty_seconds(clock):
    lines = work(io.StringIO(), clock, 100).splitlines()
    assert lines == [
        "calibrate: 3 of 10, 70 s left",
        "calibrate: 6 of 10, 40 s left",
        "calibrate: 9 of 10, 10 s left",
        "calibrate: 10 of 10, 100 s",
    ]


def test_a_terminal_gets_one_line_that_is_written_over(clock):
    text = work(Terminal(), clock, 5)
    assert text.count("\n") == 1
    assert [part.strip() for part in text.split("\r")][1:3] == [
        "calibrate: 1 of 10, 4 s left",
        "calibrate: 2 of 10, 4 s left",
    ]


def test_what_is_short_says_nothing_in_a_log(clock):
    assert work(io.StringIO(), clock, 0.5) == ""


def test_off(clock):
    stream = Terminal()
    progress = Progress(on=False, stream=stream)
    for _ in progress.phase("fit", iter("abc")):
        clock[0] += 100
    assert stream.getvalue() == ""
