"""A process in its own session that speaks JSON lines, with a deadline for every answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerGoneError(Exception):
    """The process died or did not answer in time; the message says how, for the error that names what it was doing."""


class WorkerProcess:
    """A running worker. Its stderr goes to the file ``log``.

    Args:
        environment: variables of the process.
        cwd: folder in which it runs; default: this process's.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, environment: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self.command, self._log = list(command), log
        self._pending = b""
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                self.command,
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C goes to the parent alone, which then ends its workers in order
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one line. A process that is gone shows when its answer is read."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout_seconds: float, sign_of_life: Path | None = None) -> dict[str, Any]:
        """Read one line; a process that takes longer is killed, unless it has written ``sign_of_life`` in that time.

        Raises:
            WorkerGoneError: no answer in time, the end of the stream, or a line that is no JSON object.
        """
        line = self._read_line(timeout_seconds, sign_of_life)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerGoneError(f"half a reply, then the process died ({self._exit_status()})")
        return answer

    def _read_line(self, timeout_seconds: float, sign_of_life: Path | None) -> bytes:
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            raise WorkerGoneError(f"the process was ended before ({self._exit_status()})")
        descriptor = self._process.stdout.fileno()
        deadline, seen = time.monotonic() + timeout_seconds, _written(sign_of_life)
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                before, seen = seen, _written(sign_of_life)
                if seen != before:
                    deadline = time.monotonic() + timeout_seconds
                    continue
                self.kill()
                raise WorkerGoneError(f"no answer within {timeout_seconds:g} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise WorkerGoneError(f"the process died ({self._exit_status()})")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _exit_status(self) -> str:
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return "stopped answering"
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"signal {-code}"

    def last_words(self) -> str:
        """A line with the end of its stderr, or nothing."""
        tail = self._log.read_text(encoding="utf-8", errors="replace").strip()[-800:] if self._log.exists() else ""
        return f"\nlast lines of the worker:\n{tail}" if tail else ""

    def kill(self) -> None:
        """End the process and those that it started, at once."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self, farewell: Mapping[str, Any] | None = None) -> None:
        """End it, by ``farewell`` if it heeds that within two seconds; safe to call twice and after a failure."""
        if self.running() and farewell is not None:
            self.send(farewell)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2.0)
        if self.running():
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _written(path: Path | None) -> int:
    """When a file was last written, in nanoseconds; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return 0
