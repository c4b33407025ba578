"""Kills at random moments; tests/tools/kills.py says what must hold after each."""

import pytest

from helpers import ROOT, call
from helpers.older_run import SHARDS


def kills(*flags: str) -> int:
    """The command's exit status."""
    return call(str(ROOT / "tests/tools/kills.py"), "--data", SHARDS, *flags)


def test_random_kills_lose_nothing():
    assert kills("--forked", "--kills", "5", "--seed", "7") == 0


@pytest.mark.long
def test_many_random_kills_lose_nothing():
    assert kills("--forked", "--kills", "10", "--seed", "8") == 0
