"""What a job decides when its ranks have ended, how many nodes a run can use, and how its script is filled in."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from helpers import call, ds_file
from helpers.older_run import OLD
from moe_dit import load_recipe
from moe_dit.cluster import sizes
from moe_dit.cluster.outcome import EARLY, SILENT, decide, gives_up, note_begin
from moe_dit.cluster.site import Site
from moe_dit.cluster.sizes import check_nodes, fits, node_range
from moe_dit.cluster.submit import (
    check_run,
    check_time,
    checkpoint_bytes,
    fill,
    log_folder,
    make_log_folder,
    seconds_of,
)
from moe_dit.events import JOB, events, own, record
from moe_dit.runtime.errors import InputError
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
        # Told to leave before a first step, which is no failure.
        ([START, ("requeued", None, "")] * 4, None),
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
    record(run, "started", "", 0, "a")
    assert decide(run, 0.0, 137, False, 1) == ("again", f"{SILENT} (status 137)")
    assert [(e["what"], e["step"], e["message"]) for e in events(run)][1:] == [("failed", 7, SILENT)]
    assert decide(run, 0.0, 137, True, 1)[0] == "requeue"
    write_status(run, "stopped", "a", exit_status=75, message="saved")
    assert decide(run, 0.0, 1, False, 1) == ("requeue", "saved")
    write_status(run, "failed", "a", exit_status=2, message="InputError: bad shard")
    assert decide(run, 0.0, 1, False, 1) == ("give up", "InputError: bad shard")
    write_status(run, "failed", "a", exit_status=1, message="OSError: disk")
    assert decide(run, 0.0, 1, False, 1) == ("again", "OSError: disk")
    write_status(run, "done", "a", exit_status=0)
    assert decide(run, 0.0, 1, False, 1)[0] == "done"


@pytest.mark.parametrize("starts", [("a", "b"), (None, None)], ids=["named", "of an earlier commit"])
def test_an_older_end_is_not_taken_for_this_one(run, starts):
    """status.json and events of a start before say nothing of this one, which never came to its own."""
    record(run, "started", "", 0, starts[0])
    write_status(run, "done", starts[0], exit_status=0)
    record(run, "done", "", 7, starts[0])
    note_begin(run, 1, True, "SLURM job 7")
    assert decide(run, 0.0, 1, False, 1, note=True)[0] == "again"
    assert [(e["what"], e["message"], e["step"]) for e in events(run)][2:4] == [
        ("queued", "SLURM job 7", None),
        ("failed", EARLY, None),
    ]
    note_begin(run, 2, True, "SLURM job 7")
    assert decide(run, 0.0, 1, False, 2, note=True) == ("give up", f"failed twice in the same way: {EARLY}")
    assert [e["what"] for e in events(run)][2:] == ["queued", "failed", "restarted", "failed", "gave up"]


@pytest.mark.parametrize("step", [-86400, 86400], ids=["back", "on"])
@pytest.mark.parametrize(
    ("state", "status", "decision"),
    [("stopped", 75, ("requeue", "saved")), ("failed", 2, ("give up", "InputError: bad shard"))],
)
def test_no_clock_decides(run, monkeypatch, step, state, status, decision):
    """The clock is set by a day after the job began, and again before its ranks end."""
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    record(run, "started", "", 0, "a")
    write_status(run, "done", "a", exit_status=0)
    record(run, "done", "", 3, "a")
    note_begin(run, 1, True, "")
    now += step
    record(run, "started", "", 3, "b")
    now += step
    write_status(run, state, "b", exit_status=status, message=decision[1])
    record(run, state, decision[1], 5, "b")
    assert decide(run, 1_800_000_000.0, 1, False, 1) == decision
    assert [e["what"] for e in events(run)] == ["started", "done", "queued", "started", state]


def test_names_that_are_none_decide_nothing(run):
    """A stranger's files."""
    with open(run / "events.jsonl", "w") as file:
        file.write('{"time": 1, "what": "started", "step": [], "job": {}, "start": []}\n{"time": 1, "what": []}\n')
    (run / "status.json").write_text('{"state": "stopped", "start": {}}')
    assert decide(run, 0.0, 1, False, 1)[0] == "again"


def test_a_run_without_a_word_of_a_job_is_judged_by_its_last_start(run):
    """Begun by hand: its last start stopped, the one before it failed."""
    for what in ("started", "failed", "started", "stopped"):
        record(run, what, "", 5, "b")
    write_status(run, "stopped", "b", message="saved")
    assert decide(run, 0.0, 1, False, 1) == ("requeue", "saved")


def test_a_job_that_slurm_queued_again_says_so(run):
    """Where the job itself could not; the first time is told of as such."""
    record(run, "started", "", 0, "a")
    record(run, "stopped", "", 5, "a")
    note_begin(run, 1, False, "SLURM job 7")
    note_begin(run, 1, False, "SLURM job 7")
    assert [(e["what"], e["message"]) for e in events(run)][2:] == [("requeued", "SLURM job 7")]


def test_a_job_counts_its_own_starts(run, monkeypatch):
    """Another job may have written while the folder was free, as a start that failed was being made anew."""
    monkeypatch.setenv(JOB, "c/1")
    record(run, "started", "", 100, "a")
    record(run, "failed", "OSError: disk", 105, "a")
    monkeypatch.setenv(JOB, "c/2")
    note_begin(run, 1, True, "SLURM job 2")
    assert decide(run, 0.0, 1, False, 1, note=True)[0] == "again"
    assert decide(run, 0.0, 1, False, 2, note=True) == ("give up", f"failed twice in the same way: {EARLY}")
    monkeypatch.setenv(JOB, "c/1")
    assert gives_up(list(events(run))) and gives_up(own(events(run))) is None
    record(run, "started", "", 100, "b")
    record(run, "failed", "OSError: disk", 105, "b")
    assert decide(run, 0.0, 1, False, 1)[1] == "failed twice in the same way at step 105: OSError: disk"


def test_a_command_that_refuses_is_not_tried_again(run):
    """Status 2 is bad input, of which the command told itself; the run's last start may have ended otherwise."""
    record(run, "started", "", 0, "a")
    assert decide(run, 0.0, 2, False, 1)[0] == "give up"
    assert [e["what"] for e in events(run)] == ["started"]
    write_status(run, "stopped", "a", exit_status=75, message="saved")
    assert decide(run, 0.0, 2, False, 1)[0] == "give up"


def test_several_ranks_tell_of_one_failure(run):
    """Of each start one counts, whichever ranks of it say how it ended."""
    for start in "ab":
        record(run, "started", "", 3, start)
        for rank in (1, 2):
            record(run, "failed", f"rank {rank} (n1): another rank has ended", 5, start)
        why = "failed twice in the same way at step 5: rank 1 (n1): another rank has ended" if start == "b" else None
        assert gives_up(list(events(run))) == why


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    note_begin(tmp_path, 1, True, "")
    assert decide(tmp_path, 0.0, 1, False, 1, note=True)[0] == "again"
    assert decide(tmp_path, 0.0, 2, False, 1, note=True)[0] == "give up"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_event_behind_a_line_that_was_cut_short_is_kept(run):
    record(run, "started", "", 0)
    with open(run / "events.jsonl", "a") as file:
        file.write('{"time": 1.0, "what": "str')
    record(run, "stopped", "", 5)
    assert [e["what"] for e in events(run)] == ["started", "stopped"]


def test_a_run_in_the_place_of_a_file_never_began(tmp_path):
    (tmp_path / "file").write_text("")
    assert decide(tmp_path / "file", 0.0, 1, False, 1)[0] == "again"


def test_a_job_that_is_told_to_leave_before_its_first_step_is_queued_again(run, tmp_path):
    """However often; else it would give up what nothing is wrong with."""
    for attempt in (1, 2, 3):
        assert decide(tmp_path / "none", 0.0, 138, True, attempt)[0] == "requeue"
        record(run, "failed", EARLY)
        assert decide(run, 0.0, 138, True, attempt)[0] == "requeue"


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


def test_huge_numbers_of_nodes_are_not_counted_through(tmp_path, monkeypatch):
    """digits: batches of 64, which have seven divisors."""
    tried = []
    monkeypatch.setattr(sizes, "fits", lambda *given: tried.append(given[-1]) or fits(*given))
    recipe, ds = load_recipe("digits"), str(ds_file(tmp_path, 2, 2))
    assert node_range(recipe, ds, 1000, 2) == (32, 32)
    line = r"2000 ranks: global_batch_size 64 .*; with 2 ranks a node it divides on 2, 4, 8, 16, 32$"
    with pytest.raises(InputError, match=line):
        check_nodes(recipe, ds, 1000, 2)
    assert tried == [2, 4, 8, 16, 32, 64] * 2
    for nodes, ranks in ((0, 2), (2, 0), (2**31, 1), (10**4299, 8)):
        with pytest.raises(InputError, match=r"should be from 1 to 2\^31 - 1"):
            check_nodes(recipe, ds, nodes, ranks)


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


@pytest.mark.parametrize("ending", ["\n", "\r", "\v", "\x1c", "\x85", "\u2028", "\x00", "\x1b", "\udcff"])
@pytest.mark.parametrize("place", ["option", "argument", "environment"])
def test_no_value_becomes_a_line_of_a_script(place, ending):
    value = f"x{ending}#SBATCH --uid=0"
    options = {"output": value} if place == "option" else {}
    arguments, environment = [value] * (place == "argument"), {"SITE": value} if place == "environment" else {}
    with pytest.raises(InputError, match="cannot hold a line break") as caught:
        fill("#!/bin/bash\n#SBATCH --nodes=1\n", options, arguments, environment)
    assert str(caught.value).isprintable()


def test_a_value_of_sbatch_s_is_one_word_whatever_it_holds():
    """In double quotes sbatch takes all as it is but a quote and a backslash."""
    template = "#!/bin/bash\n#SBATCH --output=x\n"
    options = {"output": "a b/%x#1.out", "comment": 'say "$(id)" \\ \'', "partition": "gpu,big"}
    assert fill(template, options, [], {}).splitlines()[1:4] == [
        '#SBATCH --output="a b/%x#1.out"',
        '#SBATCH --comment="say \\"$(id)\\" \\\\ \'"',
        "#SBATCH --partition=gpu,big",
    ]


# As a SLURM of two nodes took them.
LIMITS = {"10": 600, "0:01": 60, "1:30": 120, "24:00:00": 86400, "1-0": 86400, "1-2:3": 93780, "1-2:3:4": 93840}
LIMITS |= {
    "1:90:90": 9120,
    "0": math.inf,
    "0:00": math.inf,
    "UNLIMITED": math.inf,
    "infinite": math.inf,
    "-1": math.inf,
}


@pytest.mark.parametrize(("limit", "seconds"), LIMITS.items())
def test_a_time_limit_is_read_as_slurm_does(limit, seconds):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    "limit", ["", "abc", " 5", "5 ", "5.5", "1:2:3:4", "1-1-1", "1:-5", "1-", "\u0665", "5\n", "-2"]
)
def test_what_is_no_time_limit_is_told_of(limit):
    with pytest.raises(InputError, match="it should be minutes, minutes:seconds"):
        seconds_of(limit)


@pytest.mark.parametrize(
    ("limit", "fits"), [("5", False), ("7:00", False), ("8", True), ("0:07:59", True), ("0", True)]
)
def test_a_job_has_time_for_more_than_to_save(limit, fits):
    """It would be told to save as soon as it begins, and queue itself again, for ever."""
    site = Site(Path("site.sh"), 8, 8, 64, 300, *["x"] * 7, sbatch={})
    if fits:
        check_time(limit, site)
    else:
        with pytest.raises(InputError, match=f"--time {limit}: .* for ever without a step; give at least 8 minutes"):
            check_time(limit, site)


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [
        ("%x-%j.out", "."),
        ("logs/%j/../%j.out", None),
        ("a b/%x/%j.out", "a b/train-x"),
        ("100%%/%x%%.out", "100%"),
        ("100%%j/o", "100%j"),
        ("/dev/null", "/dev"),
        ("%j/out", None),
        ("a%/out", None),
        ("a/%5x/out", None),
        ("a\\b/out", None),
        ("", None),
        ("logs/", None),
        ("logs/..", None),
        ("/dev", None),
    ],
)
def test_the_folder_of_a_log_is_known_before_the_job(pattern, folder):
    if folder is None:
        with pytest.raises(InputError, match=r"^--output "):
            log_folder(pattern, "train-x")
    else:
        assert str(log_folder(pattern, "train-x")) == folder


def test_the_folder_of_a_log_is_made(tmp_path):
    make_log_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the log's folder .*file/x: Not a directory"):
        make_log_folder(tmp_path / "file/x")


def test_a_dry_run_refuses_what_is_no_folder_for_a_log_and_makes_none(tmp_path):
    make_log_folder(tmp_path / "a/b", dry_run=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in ("file", "file/x"):
        with pytest.raises(
            InputError, match=rf"cannot write the log's folder .*{folder}: .*/file is not a folder; give"
        ):
            make_log_folder(tmp_path / folder, dry_run=True)


@pytest.mark.parametrize(
    "latest", ["../../victim/secret", "", "\n", "/etc", "step_00000004", "step_00000003/../x", None]
)
def test_which_checkpoint_is_evaluated_is_not_what_latest_says(tmp_path, capfd, latest):
    """But one of the run's own that can be read."""
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    (run / "checkpoints/latest").unlink()
    if latest is not None:
        (run / "checkpoints/latest").write_text(latest)
    call("moe_dit.cluster.newest", run)
    name, known_by = capfd.readouterr().out.splitlines()
    assert name == "step_00000003"
    assert known_by == hashlib.sha256((run / "checkpoints/step_00000003/state.json").read_bytes()).hexdigest()


def test_a_run_without_a_checkpoint_is_not_evaluated(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "victim/secret"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(OLD / "run/checkpoints/step_00000003", secret)
    for latest in ("../../victim/secret\n", "", str(secret)):
        (run / "checkpoints/latest").write_text(latest)
        with pytest.raises(InputError):
            check_run(run)
    for other in (secret, tmp_path / "none"):
        with pytest.raises(InputError, match="no checkpoint to evaluate; give the --out of a run"):
            check_run(other)


def test_a_checkpoint_s_bytes():
    """A weight, two moments and the average in float32, and a bias for each of 3 x 8 experts."""
    assert checkpoint_bytes(load_recipe("digits")) == 4 * (4 * 2_806_176 + 24)
