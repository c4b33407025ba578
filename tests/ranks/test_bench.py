"""The bench times two forms of one function: they agree, and what it reports adds up."""

import json
import sys

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks

SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2"]


@pytest.mark.parametrize(  # the second's learning rate warms up
    ("name", "more"), [("digits", []), ("digits_pixels", ["model.in_context_start=1"])]
)
def test_what_the_bench_reports_adds_up(name, more, tmp_path):
    table, plot = tmp_path / "digits.json", tmp_path / "digits.svg"
    small = [flag for change in [*SMALL, *more] for flag in ("--set", change)]
    command = [sys.executable, "jobs/bench.py", "--recipe", name, "--batch", "4", "--pairs", "3", *small]
    command += ["--clock", "cpu"]  # by the wall's a pause of one step makes parts more than the whole
    command += ["--json", str(table), "--plot", str(plot)]
    done = forks.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    result = json.loads(table.read_text())
    assert result["recipe"] == name and result["batch"] == 4 and len(result["pairs"]) == 3
    mine, theirs = ([pair[i] for pair in result["pairs"]] for i in (0, 1))
    assert result["ours"]["seconds"]["median"] == sorted(mine)[1]
    assert result["published"]["seconds"]["median"] == sorted(theirs)[1]
    assert result["images_per_second"] == pytest.approx(4 / sorted(mine)[1])
    assert result["speedup"] == pytest.approx(sorted(b / a for a, b in zip(mine, theirs, strict=True))[1])
    for form in ("ours", "published"):
        parts = result[form]["parts"]
        assert set(parts) == {"data and draws", "forward", "backward", "optimizer", "averages", "other"}
        assert sum(parts.values()) == pytest.approx(result[form]["seconds"]["median"], rel=0.5)
    # Both took the same first steps, from the same weights: moved ones. Initial ones, whose gates and last layer are
    # zero and give experts no gradient, would begin with 1.96524.
    if name == "digits":
        assert result["agreement"]["loss"][0] == pytest.approx(1.99771, rel=1e-4)
    assert result["agreement"]["loss"][0] == pytest.approx(result["agreement"]["loss"][1], rel=1e-4)
    assert "<svg" in plot.read_text()[:1000]
    assert "times as fast as the published form" in done.stdout
