"""What is started while signals are held."""

import signal

from moe_dit.runtime.stopping import SIGNALS, signals_held


def test_what_starts_while_signals_are_held_gets_none():
    """A new process has the mask of the thread that starts it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with signals_held():
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP} == set(SIGNALS)
    assert held == before | set(SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
