"""Environments of their own for engines whose pinned packages do not fit beside modern ones.

``ziplm-deploy setup deepsparse`` makes one in the user's cache folder; ``ZIPLM_DEEPSPARSE_PYTHON`` names another
interpreter that has the engine. A marker is written last: an environment without it is not used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ziplm_deploy.errors import EngineError, EnvironmentMismatchError

MARKER = "ziplm-environment.json"


@dataclass(frozen=True)
class SideEnvironment:
    """What an engine needs: Python versions it has wheels for, and the packages to install."""

    engine: str
    pythons: tuple[tuple[int, int], ...]  # newest first
    packages: tuple[str, ...]
    notice: str  # licence, shown at set-up and by doctor

    @property
    def variable(self) -> str:
        return f"ZIPLM_{self.engine.upper()}_PYTHON"

    @property
    def folder(self) -> Path:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "ziplm-deploy" / self.engine

    def interpreter(self) -> str:
        """Python that has the engine.

        Raises:
            EngineError: there is none, or its set-up was interrupted; says which command brings it.
        """
        named = os.environ.get(self.variable)
        if named:
            if shutil.which(named) is None:
                raise EngineError(
                    f"expected a Python interpreter in {self.variable}, found {named!r}; correct or unset it"
                )
            return named
        if not self.folder.exists():
            raise EngineError(f"expected the engine {self.engine}, found it not set up; run: {self._command}")
        if not (self.folder / MARKER).is_file():
            raise EngineError(
                f"expected a whole environment in {self.folder}, found one whose set-up was interrupted; run: "
                f"{self._command}, which makes it anew"
            )
        return str(self.folder / "bin" / "python")

    @property
    def _command(self) -> str:
        return f"ziplm-deploy setup {self.engine}"

    def version(self) -> str:
        """Installed version of the engine, without importing it; raises :class:`EngineError`."""
        code = f"import importlib.metadata as m; print(m.version({self.engine!r}))"
        python = self.interpreter()
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            found = _last_line(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise EngineError(f"expected {self.engine} in {python}, found: {found}; run: {self._command}") from error
        return done.stdout.strip()

    def create(self, python: str | None = None) -> str:
        """Make the environment anew and return its interpreter.

        Raises:
            EnvironmentMismatchError: no interpreter of a version that the engine supports.
            EngineError: installing failed, or the engine cannot be imported.
        """
        base = python or self._base_python()
        self._check_version(base)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        own = str(self.folder / "bin" / "python")
        self._run([base, "-m", "venv", str(self.folder)])
        self._run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.packages])
        self._run([own, "-c", f"import {self.engine}"])
        (self.folder / MARKER).write_text(json.dumps({"packages": self.packages}) + "\n", encoding="utf-8")
        return own

    def _base_python(self) -> str:
        if sys.version_info[:2] in self.pythons:
            return sys.executable
        for major, minor in self.pythons:
            found = shutil.which(f"python{major}.{minor}")
            if found:
                return found
        raise EnvironmentMismatchError(
            f"expected Python {self._wanted} for {self.engine}, found {sys.version.split()[0]} and none of them on the "
            f"path; install one and run: {self._command} --python /path/to/python"
        )

    def _check_version(self, python: str) -> None:
        code = "import sys; print(*sys.version_info[:2])"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EnvironmentMismatchError(
                f"expected a Python interpreter at {python}, found: {error}; name another one with --python"
            ) from error
        found = tuple(map(int, done.stdout.split()))
        if found not in self.pythons:
            raise EnvironmentMismatchError(
                f"expected Python {self._wanted} for {self.engine}, found {'.'.join(map(str, found))} at {python}; "
                "name another one with --python"
            )

    @property
    def _wanted(self) -> str:
        return " or ".join(f"{major}.{minor}" for major, minor in self.pythons)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet_environment())
        if done.returncode:
            raise EngineError(
                f"expected to set up {self.engine} in {self.folder}, found: {_last_line(done.stderr)}; see "
                f"{' '.join(command[:4])} … by hand, then run: {self._command} again"
            )


def quiet_environment() -> dict[str, str]:
    """This process's environment, with the engines' analytics switched off."""
    return {**os.environ, "NM_DISABLE_ANALYTICS": "1"}


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
