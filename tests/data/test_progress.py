import io
import re

import pytest

from graphmoe.data import progress as module
from graphmoe.data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second at each look."""
    seconds = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))


def test_plain_lines_with_the_time_left(clock):
    stream = io.StringIO()
    with Progress("reading", 200, "byte", patience=2.0, every=3.0, stream=stream) as progress:
        for _ in range(9):
            progress.advance(20, "fine")
    assert stream.getvalue().splitlines() == [
        "reading: 40 of 200 bytes, fine, 2 s passed, about 8 s left",
        "reading: 100 of 200 bytes, fine, 5 s passed, about 5 s left",
        "reading: 160 of 200 bytes, fine, 8 s passed, about 2 s left",
    ]


def test_what_was_done_before_does_not_count_for_the_speed(clock):
    stream = io.StringIO()
    progress = Progress("reading", 200, "byte", stream=stream)
    progress.advance(100, skipped=True)
    progress.advance(20)
    assert progress.line(2.0) == "reading: 120 of 200 bytes, 2 s passed, about 8 s left"


def test_an_unknown_size_has_no_time_left(clock):
    progress = Progress("reading", None, "document", stream=io.StringIO())
    progress.advance(1500)
    assert progress.line(3.0) == "reading: 1,500 documents, 3 s passed"


def test_short_work_and_other_ranks_are_silent(clock, monkeypatch):
    stream = io.StringIO()
    with Progress("reading", 2, "byte", patience=100.0, stream=stream) as progress:
        progress.advance(2)
    monkeypatch.setenv("RANK", "1")
    with Progress("reading", 2, "byte", stream=stream) as progress:
        progress.advance(2)
    assert stream.getvalue() == ""


def test_bar_on_a_terminal():
    stream = Terminal()
    with Progress("reading", 200, "byte", stream=stream) as progress:
        progress.advance(50, "half of half")
    assert re.search(r"reading: +25%.*50\.0/200.*half of half", stream.getvalue())
