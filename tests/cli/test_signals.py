"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ziplm_deploy.cli.app import Terminated, end_in_order
from ziplm_deploy.cli.commands import app
from ziplm_deploy.models import inspection


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    end_in_order()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_is_an_interrupt_and_the_second_one_ends_at_once() -> None:
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert issubclass(Terminated, KeyboardInterrupt)  # what ends workers at Ctrl-C ends them now


def test_ctrl_c_interrupts_every_time() -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as error:
            signal.raise_signal(signal.SIGINT)
        assert type(error.value) is KeyboardInterrupt


def test_a_background_job_still_ignores_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_in_order()
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_that_became_an_error_of_a_library_is_still_one(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ gives Python's exceptions back as errors of its own, as torch does within an export."""

    def library(*arguments: Any, **settings: Any) -> Any:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise RuntimeError("KeyboardInterrupt: <EMPTY MESSAGE>") from error

    monkeypatch.setattr(inspection, "inspect_model", library)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == code
    assert "the same command continues where it was" in result.stderr

    def fails(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("another command's own fault")

    monkeypatch.setattr(inspection, "inspect_model", fails)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, RuntimeError)
    assert "terminated" not in result.stderr
