"""What a job decides when its ranks have ended, how many nodes a run can use, and how its script is filled in."""

import json
import time

import pytest

from helpers import ds_file
from moe_dit import load_recipe
from moe_dit.cluster.outcome import EARLY, SILENT, decide, gives_up
from moe_dit.cluster.sizes import fits, node_range
from moe_dit.cluster.submit import checkpoint_bytes, fill
from moe_dit.events import events, record
from moe_dit.status import write_status


def history(*told: tuple) -> list[dict]:
    """Events from (what, step, message)."""
    return [{"time": 0.0, "what": what, "step": step, "message": message} for what, step, message in told]


START = ("started", 100, "")
NAN = ("failed", 120, "Stop: the loss is nan at step 120")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([START, NAN], None),
        ([START, NAN, START, NAN], "failed twice in the same way at step 120: Stop: the loss is nan at step 120"),
        ([START, NAN, START, ("failed", 121, "Stop: the loss is nan at step 121")], None),
        ([START, NAN, START, ("failed", 120, "OSError: disk")], None),
        ([START, NAN, ("queued", None, "SLURM job 7"), START, NAN], None),
        ([START, NAN, START, ("stopped", 119, ""), START, NAN], None),
        # Ports and addresses are other ones each time.
        (
            [
                START,
                ("failed", 9, "RuntimeError: closed by [1.2.3.4]:50"),
                START,
                ("failed", 9, "RuntimeError: closed by [1.2.3.5]:61"),
            ],
            "failed twice in the same way at step 9: RuntimeError: closed by [1.2.3.5]:61",
        ),
        ([("failed", None, EARLY), ("failed", None, EARLY)], f"failed twice in the same way: {EARLY}"),
        ([START, ("failed", 130, SILENT), START, ("failed", 130, SILENT)], None),
        ([START, ("failed", 130, SILENT)] * 3, f"{SILENT}, 3 times since its last checkpoint (step 100)"),
        # torchrun ended its ranks, which could not say so.
        ([START, START, START, ("failed", 130, SILENT)], f"{SILENT}, 3 times since its last checkpoint (step 100)"),
        ([START, ("failed", 130, SILENT), ("started", 200, ""), ("failed", 210, SILENT)] * 2, None),
    ],
)
def test_a_run_that_does_not_get_on_is_given_up(told, why):
    assert gives_up(history(*told)) == why


@pytest.fixture
def run(tmp_path):
    """A run's folder that has recorded seven steps, and a line that a kill cut short."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "lo']))
    return folder


def test_what_follows_from_how_a_run_ended(run):
    began = int(time.time())  # as `date +%s`
    record(run, "started", "", 0)
    assert decide(run, began, 137, False, 1) == ("again", f"{SILENT} (status 137)")
    assert [(e["what"], e["step"], e["message"]) for e in events(run)][1:] == [("failed", 7, SILENT)]
    assert decide(run, began, 137, True, 1)[0] == "requeue"
    write_status(run, "stopped", exit_status=75, message="saved")
    assert decide(run, began, 1, False, 1) == ("requeue", "saved")
    write_status(run, "failed", exit_status=2, message="InputError: bad shard")
    assert decide(run, began, 1, False, 1) == ("give up", "InputError: bad shard")
    write_status(run, "failed", exit_status=1, message="OSError: disk")
    assert decide(run, began, 1, False, 1) == ("again", "OSError: disk")
    write_status(run, "done", exit_status=0)
    assert decide(run, began, 1, False, 1)[0] == "done"


def test_an_older_end_is_not_taken_for_this_one(run):
    """status.json and events of a start before say nothing of this one, which never came to its own."""
    write_status(run, "done", exit_status=0)
    record(run, "started", "", 0)
    began = time.time() + 1000
    assert decide(run, began, 1, False, 1)[0] == "again"
    told = list(events(run))[-1]
    assert (told["what"], told["message"], told["step"]) == ("failed", EARLY, None)
    assert decide(run, began + 1, 1, False, 2) == ("give up", f"failed twice in the same way: {EARLY}")


def test_a_run_that_never_began_is_tried_twice(tmp_path):
    assert decide(tmp_path / "none", 0.0, 1, False, 1)[0] == "again"
    assert decide(tmp_path / "none", 0.0, 1, False, 2) == ("give up", EARLY)


@pytest.mark.parametrize(
    ("nodes", "ranks", "span"),
    [(1, 1, None), (2, 1, (2, 2)), (3, 1, (2, 2)), (4, 1, (4, 4)), (2, 2, (1, 2)), (3, 2, (1, 2)), (8, 2, (8, 8))],
)
def test_numbers_of_nodes_that_divide(tmp_path, nodes, ranks, span):
    """digits: batches of 64, 8 experts; two expert-parallel ranks."""
    assert node_range(load_recipe("digits"), str(ds_file(tmp_path, 2, 2)), nodes, ranks) == span


def test_what_divides(tmp_path):
    recipe = load_recipe("digits")
    assert [n for n in range(1, 17) if fits(recipe, str(ds_file(tmp_path, 2, 2)), n)] == [2, 4, 8, 16]


def test_a_template_is_filled_in():
    template = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --gpus-per-node=8\n#SBATCH --requeue\n\nrun\n"
    filled = fill(template, {"nodes": "3", "gpus-per-node": None, "mem": "0"}, ["--out", "a b"], {"SITE": "/x/site.sh"})
    assert filled == (
        "#!/bin/bash\n#SBATCH --nodes=3\n#SBATCH --requeue\n#SBATCH --mem=0\n\nset -- --out 'a b'\n"
        "export SITE=/x/site.sh\n\nrun\n"
    )


def test_a_checkpoint_s_bytes():
    """A weight, two moments and the average in float32, and a bias for each of 3 x 8 experts."""
    assert checkpoint_bytes(load_recipe("digits")) == 4 * (4 * 2_806_176 + 24)
