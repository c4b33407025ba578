"""What is started while signals are held, and which torchrun cannot go on."""

import signal
from types import SimpleNamespace

import pytest

from moe_dit.runtime import stopping
from moe_dit.runtime.stopping import SIGNALS, signals_held


def test_what_starts_while_signals_are_held_gets_none():
    """A new process has the mask of the thread that starts it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with signals_held():
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP} == set(SIGNALS)
    assert held == before | set(SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(
    ("flags", "answer", "asked", "killed"),
    [
        (["--rdzv-endpoint=n1:29400", "train.py"], TimeoutError(), ("n1", 29400), True),
        (["--rdzv_endpoint", "n1.site:29400", "train.py"], OSError("No route to host"), ("n1.site", 29400), True),
        (["--rdzv-endpoint=[fd00::1]:29400", "train.py"], None, ("fd00::1", 29400), False),
        # It sees itself that nobody keeps the store.
        (["--rdzv-endpoint=n1:29400", "train.py"], ConnectionRefusedError(), ("n1", 29400), False),
        (["--master-addr=n1", "train.py"], TimeoutError(), ("10.9.0.1", 29500), True),
        (["train.py", "--rdzv-endpointless=n1:1"], None, ("10.9.0.1", 29500), False),
    ],
)
def test_a_torchrun_whose_rendezvous_is_lost_is_killed(monkeypatch, flags, answer, asked, killed):
    places, ends = [], []

    def connect(place, timeout):
        places.append(place)
        if answer is not None:
            raise answer
        return SimpleNamespace(close=lambda: None)

    command = ["/usr/bin/python", "-m", "torch.distributed.run", *flags]
    agent = SimpleNamespace(cmdline=lambda: command, kill=lambda: ends.append("killed"))
    shell = SimpleNamespace(cmdline=lambda: ["bash", "job.sh"], kill=lambda: ends.append("wrong"))
    monkeypatch.setattr(stopping, "launchers", lambda: [agent, shell])
    monkeypatch.setattr(stopping.socket, "create_connection", connect)
    monkeypatch.setenv("MASTER_ADDR", "10.9.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    stopping.end_lost_torchrun(1.0)
    assert places == [asked] and ends == ["killed"] * killed
