"""Faults at random moments; tests/tools/faults.py says what must hold after each."""

import pytest

from helpers import ROOT, call
from helpers.older_run import SHARDS


@pytest.mark.long
def test_random_faults_lose_nothing_under_true_launchers():
    assert call(str(ROOT / "tests/tools/faults.py"), "--data", SHARDS, "--faults", "8", "--seed", "8") == 0
