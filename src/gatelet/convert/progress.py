"""Lines that show the progress of a long computation."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Named phases with the time left: one line that is overwritten on a terminal, a line every 30 seconds elsewhere.

    Args:
        on: whether to write anything.
        stream: where to, standard error by default.

    Phases of less than a second write nothing.

    >>> progress = Progress(on=False)
    >>> sum(progress.phase("calibrate", range(3)))
    3
    """

    def __init__(self, on: bool = True, stream: Any = None) -> None:
        self.on, self.stream = on, stream or sys.stderr
        self.terminal = self.on and self.stream.isatty()
        self.name, self.total = "", 0
        self.begin = self.last = time.monotonic()

    def phase(self, name: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Yield the items and count them; ``total``: how many there will be, where that has no ``len``."""
        self.start(name, total if total is not None else len(items) if isinstance(items, Sized) else 0)
        done = 0
        for item in items:
            yield item
            done += 1
            self.step(done)
        self.end(done)

    def start(self, name: str, total: int) -> None:
        """Begin a phase; ``total`` 0: its length is not known."""
        self.name, self.total = name, total
        self.begin = self.last = time.monotonic()

    def step(self, done: int, what: str = "") -> None:
        """Write that this much is done, if the last line is long enough ago."""
        now = time.monotonic()
        if not self.on or now - self.last < (0.2 if self.terminal else EVERY):
            return
        self.last = now
        left = f", {(now - self.begin) / done * (self.total - done):.0f} s left" if self.total and done else ""
        self._write(f"{self.name}: {done}{self._of()}{what and ', '}{what}{left}")

    def end(self, done: int, what: str = "") -> None:
        """Close the phase with a line."""
        seconds = time.monotonic() - self.begin
        if self.on and seconds >= 1:
            self._write(f"{self.name}: {done}{self._of()}{what and ', '}{what}, {seconds:.0f} s")
            if self.terminal:
                print(file=self.stream)

    def _of(self) -> str:
        return f" of {self.total}" if self.total else ""

    def _write(self, line: str) -> None:
        print(f"\r{line:<78}" if self.terminal else line, end="" if self.terminal else "\n", file=self.stream)
        self.stream.flush()
