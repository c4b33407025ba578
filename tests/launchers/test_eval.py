"""Sampling by torchrun's ranks."""

import subprocess
import sys

from helpers import ENV, ROOT, call
from helpers.sampling import assert_same, pictures, write_model


def test_two_ranks_make_the_same_samples(tmp_path):
    write_model(tmp_path)
    flags = list(map(str, ["--model", tmp_path / "model", "-n", 40, "--batch", 8]))
    assert call("eval.sample", *flags, "--out", tmp_path / "one") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "eval.sample", *flags, "--out", str(tmp_path / "two")]
    assert subprocess.run(command, cwd=ROOT, env=ENV, timeout=300).returncode == 0
    assert_same(pictures(tmp_path / "two"), pictures(tmp_path / "one"))
