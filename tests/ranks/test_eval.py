"""Sampling by several ranks, and sampling that is killed and continued."""

import sys
import time

from helpers import ENV, ROOT, TIMEOUT, call, forks, free_port, half_done
from helpers.sampling import assert_same, pictures, write_model


def test_a_killed_run_continues_to_the_same_samples(tmp_path):
    write_model(tmp_path)
    out = tmp_path / "killed"
    flags = ["--model", tmp_path / "model", "--num", 40, "--batch", 8, "--steps", 10]
    command = half_done("eval.sample", "eval.generate", "generate", after=3)
    command += [*map(str, flags), "--out", str(out)]
    process = forks.Popen(command, cwd=ROOT, env=ENV)
    while process.poll() is None and len(list(out.glob("images/*.png"))) < 8:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 0 < len(pictures(out)) < 40
    assert call("eval.score", out, "--reference", out) == 2  # not whole yet
    (out / "images" / ".000039_9.png.tmp").write_bytes(b"half a file")
    assert call("eval.sample", *flags, "--out", out) == 0
    assert call("eval.sample", *flags, "--out", tmp_path / "whole") == 0
    assert_same(pictures(out), pictures(tmp_path / "whole"))
    assert not list(out.glob("images/.*"))


def test_two_ranks_make_the_same_samples(tmp_path):
    write_model(tmp_path)
    flags = list(map(str, ["--model", tmp_path / "model", "-n", 40, "--batch", 8]))
    assert call("eval.sample", *flags, "--out", tmp_path / "one") == 0
    tasks = [sys.executable, "tests/helpers/tasks.py", "2", str(free_port())]
    command = [*tasks, "-m", "eval.sample", *flags, "--out", str(tmp_path / "two")]
    assert forks.run(command, cwd=ROOT, env=ENV, timeout=TIMEOUT).returncode == 0
    assert_same(pictures(tmp_path / "two"), pictures(tmp_path / "one"))
