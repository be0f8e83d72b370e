"""Progress of long work: stage k/n, units done, and the time left as extrapolated from measured units."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

StepProgress = Callable[[int, int], None]  # (units done, units in all, or at most)
Note = Callable[[str], None]


class Progress:
    """Silent; subclasses show it. A stage is announced once, its units as they are done."""

    def stage(self, name: str, index: int, total: int) -> None:
        """Stage ``index`` of ``total`` begins."""

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` units of the current stage are finished."""

    def note(self, text: str) -> None:
        """Something the user should read."""


class ConsoleProgress(Progress):
    """Lines on a stream: one a stage, refreshed in place on a terminal, every few seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None, interval_s: float | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._interval_s = interval_s if interval_s is not None else (0.2 if self._live else 10.0)
        self._title, self._began, self._shown = "", time.monotonic(), 0.0
        self._open_line = False
        self._done = 0

    def stage(self, name: str, index: int, total: int) -> None:
        self._end_line()
        self._title = f"[{index}/{total}] {name}"
        self._began = self._shown = time.monotonic()
        self._done = 0
        print(self._title, file=self._stream, flush=True)

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self._done:  # another round of units begins: its own pace gives the time left
            self._began = now
        self._done = done
        if total <= 0 or (now - self._shown < self._interval_s and done < total):
            return
        self._shown = now
        elapsed = now - self._began
        left = elapsed / done * (total - done) if done else float("nan")
        text = f"{self._title}: {done}/{total}, {elapsed:.0f} s, about {left:.0f} s left" if done else self._title
        if self._live:
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)
            self._open_line = True
        elif done < total:
            print(text, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        self._end_line()
        print(f"    {text}", file=self._stream, flush=True)

    def _end_line(self) -> None:
        if self._open_line:
            print(file=self._stream)
            self._open_line = False
