"""Faults at random moments; tests/tools/faults.py says what must hold after each."""

import pytest

from helpers import ROOT, call
from helpers.older_run import SHARDS


def faults(*flags: str) -> int:
    """The command's exit status."""
    return call(str(ROOT / "tests/tools/faults.py"), "--data", SHARDS, *flags)


def test_random_faults_lose_nothing():
    assert faults("--forked", "--faults", "7", "--launcher", "deepspeed", "--seed", "7") == 0


@pytest.mark.long
def test_random_faults_lose_nothing_under_true_launchers():
    assert faults("--faults", "14", "--seed", "8") == 0
