"""Disks that fail: what a run does where an operation on one of its files goes wrong, as docs/runs.md says."""

import errno
import itertools
import os
import re
from pathlib import Path

import pytest
import torch

from helpers import ENV, ROOT, losses, small, state_of
from helpers.faults import ERRORS, OPERATIONS, fault, library
from moe_dit.status import read_status

# The files of docs/runs.md's table: their patterns in a run's folder.
FILES = {
    "the run's folder": "",
    ".lock": "/.lock",
    "config.yaml": "/*config.yaml*",
    "ds_config.json": "/*ds_config.json*",
    "history.json": "/*history.json*",
    "starts.json": "/*starts.json*",
    "memory.json": "/*memory.json*",
    "status.json": "/*status.json*",
    "events.jsonl": "/events.jsonl",
    "metrics.jsonl": "/metrics.jsonl",
    "ranks.json": "/*ranks.json*",
    "logs/": "/logs*",
    "tensorboard/": "/tensorboard*",
    "checkpoints/": "/checkpoints",
    "a checkpoint's folder": "/checkpoints/?step_0000000[0-9].tmp",
    "a checkpoint's name": "/checkpoints/step_0000000[0-9]",
    "a rank's share": "/checkpoints/?step_0000000[0-9].tmp/*.distcp",
    ".metadata": "/checkpoints/?step_0000000[0-9].tmp/.metadata*",
    "state.json": "/checkpoints/?step_0000000[0-9].tmp/*state.json*",
    "latest": "/checkpoints/*latest*",
    "an old checkpoint": "/checkpoints/.step_*.old.*",
}


def table() -> dict[str, list[str]]:
    """What docs/runs.md says: a file's outcomes by operation."""
    lines = (ROOT / "docs/runs.md").read_text().splitlines()
    start = lines.index(f"| file | {' | '.join(OPERATIONS)} |")
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {name: outcomes for name, *outcomes in cells}


def cases():
    """Each operation on each file: for ever with each error, and once; of each file one of them in the short part."""
    says = table()
    assert list(says) == list(FILES)
    for number, (name, outcomes) in enumerate(says.items()):
        done = [operation for operation, outcome in zip(OPERATIONS, outcomes, strict=True) if outcome != "-"]
        chosen = done[number % len(done)], ERRORS[number % len(ERRORS)], 0
        for operation, outcome in zip(OPERATIONS, outcomes, strict=True):
            errors = [(error, 0) for error in ERRORS] + [(ERRORS[0], 1)]
            for error, times in errors if outcome != "-" else errors[:1]:
                marks = [] if (operation, error, times) == chosen else [pytest.mark.long]
                case = f"{name}-{operation}-{error}-{'once' if times else 'always'}"
                yield pytest.param(name, operation, error, times, outcome, marks=marks, id=case)


@pytest.mark.parametrize(("name", "operation", "error", "times", "outcome"), cases())
def test_a_run_does_what_the_table_says(name, operation, error, times, outcome, tmp_path, shared):
    run, log, whole = tmp_path / "run", tmp_path / "faults", small.eight_steps(shared)
    flags = ["--steps=8", "--set=checkpoint.every=2", "--set=checkpoint.keep=1"]
    more = ["--steps=51", "--set=checkpoint.every=51"] if name == "ranks.json" else []  # the first are of step 50
    environment = ENV | fault(operation, f"{run}{FILES[name]}", log, error, times)
    done = small.train_here(run, *flags, *more, library=str(library(shared)), env=environment)
    assert log.exists() == (outcome != "-"), done.stderr
    assert (done.stdout, "Traceback" in done.stderr) == ("", False), done.stderr
    usual = r"training \d|done: |digits on |the checks before"
    lines = [line for line in done.stderr.splitlines() if not re.match(usual, line)]
    words = os.strerror(getattr(errno, error))
    if times and name == "the run's folder" and operation in ("open", "fsync"):
        outcome = "goes on"  # what opens it first is status.json, a note
    if outcome in ("-", "goes on", "silent"):
        assert done.returncode == 0, done.stderr
        told = {"-": 0, "silent": 0, "goes on": 1}[outcome]
        # What works the second time need not be told of.
        assert len(lines) in ({told} if times == 0 else {told, 0}) and all(words in line for line in lines), lines
        if not (name == "metrics.jsonl" and times == 0):
            assert losses(run)[:8] == losses(whole)
        if not more:
            assert_same_state(run, whole)
        return
    *notes, line = lines
    assert line.startswith("error: ") and words in line, lines
    # What fails a whole folder fails its notes too.
    assert all(note.endswith("goes on without it") for note in notes) and (not notes or name == "the run's folder")
    saves = "could not be written" in line or "not saved" in line
    assert (outcome, done.returncode) == (("save fails", 1) if saves else ("does not start", done.returncode))
    assert done.returncode in (1, 2)
    if name != "the run's folder" and name != ".lock":
        assert read_status(run)["state"] == "failed" and words in read_status(run)["message"]
    again = small.train_here(run, *flags)
    assert again.returncode == 0, again.stderr
    assert losses(run) == losses(whole)
    assert_same_state(run, whole)


def assert_same_state(run: Path, whole: Path) -> None:
    """The last checkpoint is that of a run that met nothing, and nothing is left beside it for good."""
    for kind in ("weight", "ema"):
        want = state_of(whole, 8, kind, str(whole / "config.yaml"))
        got = state_of(run, 8, kind, str(whole / "config.yaml"))
        assert all(torch.equal(value, want[key]) for key, value in got.items())
