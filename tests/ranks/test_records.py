"""Records that are set aside when a run continues, where that is killed."""

import os
import signal
import sys

from moe_dit import load_recipe
from moe_dit.metrics import Metrics

CHANGES = {
    "open",
    "write",
    "flush",
    "fsync",
    "truncate",
    "close",
    "__exit__",
    "print",
}  # calls that change a file, or tell
RECIPE = load_recipe("digits", ["metrics.sinks=[]"])


def test_a_start_that_is_killed_loses_no_record(tmp_path):
    """Killed before each call that may change a file, as long as there is one; then started again."""
    lines = [b'{"step": %d, "loss": 0.5}\n' % step for step in range(1, 13)]
    kept, aside = b"".join(lines[:5]), b"".join(lines[5:]) + b'{"step": 13, "lo'
    data = kept + aside
    kills, both = 0, 0
    while True:
        run = tmp_path / str(kills)
        run.mkdir()
        (run / "metrics.jsonl").write_bytes(data)
        child = os.fork()
        if child == 0:
            left = [kills]

            def kill_at(frame, event, argument, left=left):
                left[0] -= event == "c_call" and argument.__name__ in CHANGES
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            metrics = Metrics.__new__(Metrics)
            metrics.path = run / "metrics.jsonl"
            sys.stderr = open(os.devnull, "w")
            sys.setprofile(kill_at)
            metrics._keep_until(5)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        after = (run / "metrics.jsonl").read_bytes()
        other = (run / "metrics_superseded.jsonl").read_bytes() if (run / "metrics_superseded.jsonl").exists() else b""
        assert after == data or (after == kept and other == aside)
        both += after == data and other == aside
        Metrics(run, 5, RECIPE, 5).close()
        assert (run / "metrics.jsonl").read_bytes() == kept
        other = (run / "metrics_superseded.jsonl").read_bytes()
        assert other.endswith(aside)  # an earlier try's part may stand before it, on lines of its own
        assert other == aside or other[: -len(aside)].endswith(b"\n")
        if status == 0:
            break
        kills += 1
    assert kills > 10 and both > 1  # both: killed between the copy and the cut
