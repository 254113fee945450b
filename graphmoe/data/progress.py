"""How far a walk over a corpus has come: a bar on a terminal, now and then a plain line elsewhere."""

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Context manager that says how far a task has come and, where its size is known, the time left.

    Args:
        what: What is being done, such as ``"checking data"``.
        total: Size of the whole, or ``None`` where nobody knows.
        unit: Singular of what is counted.
        patience: Seconds of silence at first; a task that ends within them says nothing.
        every: Seconds between plain lines.
        stream: Where to write; stderr by default. Only the first process of several writes.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        patience: float = 0.0,
        every: float = 10.0,
        stream: TextIO | None = None,
    ):
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.stream = stream or sys.stderr
        self.done, self.skipped, self.text = 0, 0, ""
        self.quiet = os.environ.get("RANK", "0") != "0"
        self.began = time.perf_counter()
        self._next = self.began + patience
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int, text: str = "", *, skipped: bool = False) -> None:
        """Note that ``count`` more are done; ``text`` is said beside the figures.

        What is ``skipped`` was done before, and says nothing about the speed.
        """
        self.done += count
        self.skipped += count if skipped else 0
        self.text = text
        now = time.perf_counter()
        if self.quiet or now < self._next:
            return
        if self.stream.isatty():
            self._draw()
            self._next = now + 0.1
        else:
            print(self.line(now - self.began), file=self.stream, flush=True)
            self._next = now + self.every

    def line(self, passed: float) -> str:
        """The plain line after ``passed`` seconds."""
        whole = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.what}: {self.done:,}{whole} {self.unit}s"]
        if self.text:
            parts.append(self.text)
        parts.append(f"{passed:.0f} s passed")
        if self.total and self.done > self.skipped:
            left = passed / (self.done - self.skipped) * max(0, self.total - self.done)
            parts.append(f"about {left:.0f} s left")
        return ", ".join(parts)

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = tqdm(
                desc=self.what,
                total=self.total,
                initial=self.skipped,
                unit=self.unit,
                unit_scale=True,
                file=self.stream,
            )
            self._bar.start_t -= time.perf_counter() - self.began  # speed and time left since the start
        self._bar.set_postfix_str(self.text, refresh=False)
        self._bar.update(self.done - self._bar.n)
