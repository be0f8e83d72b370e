"""Environments of their own for what pins packages that do not fit beside modern ones: engines and tools.

``ziplm-deploy setup NAME`` makes one of :data:`ENVIRONMENTS` in the user's cache folder; a variable such as
``ZIPLM_DEEPSPARSE_PYTHON`` names another interpreter that has it. A marker is written last: an environment without it
is not used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ziplm_deploy.errors import EngineError, EnvironmentMismatchError, StorageError
from ziplm_deploy.machine.locks import FileLock

MARKER = "ziplm-environment.json"
VERSION_SECONDS = 60.0  # an interpreter starts within one, on a cold and busy machine within a few


@dataclass(frozen=True)
class SideEnvironment:
    """What a package needs: Python versions that it works with, and the packages to install."""

    name: str  # of the package
    pythons: tuple[tuple[int, int], ...]  # newest first
    packages: tuple[str, ...]
    notice: str  # licence and state, shown at set-up and by doctor

    @property
    def variable(self) -> str:
        return f"ZIPLM_{self._module.upper()}_PYTHON"

    @property
    def folder(self) -> Path:
        """Where the environment lies: in the user's cache."""
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "ziplm-deploy" / self.name

    def interpreter(self) -> str:
        """Python that has the package.

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
            raise EngineError(f"expected {self.name}, found it not set up; run: {self._command}")
        if not (self.folder / MARKER).is_file():
            raise EngineError(
                f"expected a whole environment in {self.folder}, found one whose set-up was interrupted; run: "
                f"{self._command}, which makes it anew"
            )
        return str(self.folder / "bin" / "python")

    @property
    def _module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def _command(self) -> str:
        return f"ziplm-deploy setup {self.name}"

    def version(self, python: str | None = None) -> str:
        """Version of the package in :meth:`interpreter` or ``python``, without importing it; asked for once a process.

        Raises:
            EngineError: it is not there, or the interpreter gives no answer.
        """
        python = python or self.interpreter()
        try:
            return _installed_version(self.name, python)
        except (OSError, subprocess.SubprocessError) as error:
            found = _last_line(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise EngineError(f"expected {self.name} in {python}, found: {found}; run: {self._command}") from error

    def check(self) -> None:
        """Raise :class:`EngineError` unless the package is there, in the version that a set-up installs."""
        found, wanted = self.version(), self._pinned_version
        if found != wanted:
            raise EngineError(
                f"expected {self.name} {wanted} in {self.interpreter()}, found {found!r}; unset {self.variable} if it "
                f"names another Python, and run: {self._command}"
            )

    @property
    def _pinned_version(self) -> str:
        start = f"{self.name}=="
        return next(package.removeprefix(start) for package in self.packages if package.startswith(start))

    def create(self, python: str | None = None) -> str:
        """Make the environment anew and return its interpreter; one that is there stays until the new one works.

        Raises:
            EnvironmentMismatchError: no interpreter of a version that the package supports.
            EngineError: installing failed, the package cannot be imported, or another process is at it.
            StorageError: the cache folder cannot be written.
        """
        base = python or self._base_python()
        self._check_version(base)
        _installed_version.cache_clear()
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"expected to make an environment in {self.folder}, found: {error}; let XDG_CACHE_HOME name a folder "
                "that can be written"
            ) from error
        lock = FileLock(self.folder.with_name(f".{self.name}.lock"))
        if not lock.acquire():
            raise EngineError(
                f"expected to set up {self.name} alone, found another set-up of it at work ({lock.holder}); wait until "
                "it has ended"
            )
        try:
            self._install(base)
        finally:
            lock.release()
        return str(self.folder / "bin" / "python")

    def _install(self, base: str) -> None:
        """Install into a new folder, which takes the place of the one that works only when it works too."""
        making, old = (self.folder.with_name(f".{self.name}.{what}") for what in ("new", "old"))
        for left in (making, old):  # by a set-up that was killed
            shutil.rmtree(left, ignore_errors=True)
        own = str(making / "bin" / "python")
        try:
            making.mkdir()
            self._run([base, "-m", "venv", str(making)])
            self._run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.packages])
            self._run([own, "-c", f"import {self._module}"])
            (making / MARKER).write_text(json.dumps({"packages": self.packages}) + "\n", encoding="utf-8")
            if self.folder.exists():
                self.folder.rename(old)
            making.rename(self.folder)  # its python finds its packages from where it lies; scripts beside it would not
        finally:
            for left in (making, old):
                shutil.rmtree(left, ignore_errors=True)

    def _base_python(self) -> str:
        if sys.version_info[:2] in self.pythons:
            return sys.executable
        for major, minor in self.pythons:
            found = shutil.which(f"python{major}.{minor}")
            if found:
                return found
        raise EnvironmentMismatchError(
            f"expected Python {self._wanted} for {self.name}, found {sys.version.split()[0]} and none of them on the "
            f"path; install one and run: {self._command} --python /path/to/python"
        )

    def _check_version(self, python: str) -> None:
        code = "import sys; print(*sys.version_info[:2])"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, errors="replace", check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EnvironmentMismatchError(
                f"expected a Python interpreter at {python}, found: {error}; name another one with --python"
            ) from error
        found = re.fullmatch(r"(\d+) (\d+)\s*", done.stdout)
        if found is None:
            raise EnvironmentMismatchError(
                f"expected a Python interpreter at {python}, found a program that answers {done.stdout[:60]!r}; name "
                "another one with --python"
            )
        if (int(found[1]), int(found[2])) not in self.pythons:
            raise EnvironmentMismatchError(
                f"expected Python {self._wanted} for {self.name}, found {found[1]}.{found[2]} at {python}; name "
                "another one with --python"
            )

    @property
    def _wanted(self) -> str:
        return " or ".join(f"{major}.{minor}" for major, minor in self.pythons)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet_environment())
        if done.returncode:
            raise EngineError(
                f"expected to set up {self.name} in {self.folder}, found: {_last_line(done.stderr)}; see "
                f"{shlex.join(command)} by hand, then run: {self._command} again"
            )


DEEPSPARSE = SideEnvironment(
    name="deepsparse",
    pythons=((3, 11), (3, 10), (3, 9), (3, 8)),
    packages=("deepsparse==1.8.0", "numpy<2", "setuptools<81"),
    notice="DeepSparse's licence allows evaluation, not production use; read it before you deploy",
)
NEURAL_COMPRESSOR = SideEnvironment(
    name="neural-compressor",
    pythons=((3, 12), (3, 11), (3, 10)),
    # It reads onnx.mapping, which newer onnx has not, and pkg_resources; six it imports without asking for it.
    packages=(
        "neural-compressor==2.6",
        "numpy==1.26.4",
        "onnx==1.17.0",
        "onnxruntime==1.23.2",
        "protobuf<8",
        "setuptools<81",
        "six",
    ),
    notice="Apache-2.0; 2.6 is its last release that quantizes ONNX files",
)
ENVIRONMENTS = {environment.name: environment for environment in (DEEPSPARSE, NEURAL_COMPRESSOR)}


def quiet_environment() -> dict[str, str]:
    """This process's environment, with the analytics of engines switched off."""
    return {**os.environ, "NM_DISABLE_ANALYTICS": "1", "ORT_DISABLE_TELEMETRY": "1"}


@functools.cache
def _installed_version(package: str, python: str) -> str:
    """Version of a package in another interpreter. Errors are not kept: who mends one can ask again."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=VERSION_SECONDS)
    return done.stdout.strip()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
