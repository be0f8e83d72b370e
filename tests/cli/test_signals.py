"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import signal

import pytest

from ziplm_deploy.cli.app import Terminated, end_in_order_on_sigterm


def test_sigterm_is_an_interrupt_and_the_second_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        end_in_order_on_sigterm()
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert issubclass(Terminated, KeyboardInterrupt)  # what ends workers at Ctrl-C ends them now
