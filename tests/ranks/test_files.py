"""Writing whole or not at all: kills."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from helpers import ENV, ROOT, forks, losses, small
from helpers.older_run import OLD
from moe_dit.cluster.outcome import decide
from moe_dit.export import checkpoint_recipe
from moe_dit.lineage import choose, find_checkpoint, newest
from moe_dit.run_folder import check_run_folder
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import new_file, remove_unfinished, write_text
from moe_dit.runtime.lock import lock_folder
from moe_dit.watch import read_run

WRITER = """
import sys, itertools
from pathlib import Path
from moe_dit.runtime.files import new_folder, write_text
root = Path(sys.argv[1])
for i in itertools.count():
    write_text(root / "file", f"{i}\\n" * 20_000)
    with new_folder(root / "folder", ours=["part*"]) as folder:
        for part in range(20):
            (folder / f"part{part}").write_text(f"{i}")
    print(i, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    for number in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writer = forks.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE)
        assert writer.stdout.readline()  # it has written once
        time.sleep(0.003 * number)
        writer.kill()
        writer.wait()
        lines = (tmp_path / "file").read_text().splitlines()
        assert len(lines) == 20_000 and len(set(lines)) == 1
        if (tmp_path / "folder").exists():  # replacing a folder takes two renames: for a moment there is none
            assert len({part.read_text() for part in (tmp_path / "folder").iterdir()}) == 1
            assert len(list((tmp_path / "folder").iterdir())) == 20
        remove_unfinished(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder"}


def test_a_signal_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "before")
    child = os.fork()
    if child == 0:
        with new_file(tmp_path / "file") as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "file").read_text() == "before"


def test_a_log_on_a_full_disk_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": full, "capture_output": False}
        done = small.train_here(tmp_path / "run", "--steps=3", "--set=checkpoint.every=3", **streams)
    assert done.returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(small.LOSSES[:3], rel=1e-6)


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "metrics.jsonl", "status.json", "logs"])
def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(name, shared, tmp_path):
    run = small.copy(small.eight_steps(shared), tmp_path)
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    done = small.train_here(run, "--steps=9", "--set=checkpoint.every=9")
    assert (done.returncode, "Traceback" in done.stderr) == (2 if name == ".lock" else 0, False), done.stderr
    assert done.stderr.count("is not a file; move it away") == (name == ".lock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("closed", ["the folder", "its files"])
def test_another_users_closed_run_is_one_line(closed):
    """A run made under umask 077, where its folder may not be entered, or may, and nothing in it be read."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed too
        run = shutil.copytree(OLD / "run", Path(place) / "run")
        os.chmod(place, 0o755)
        for path in [run, *run.rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)
        if closed == "its files":
            run.chmod(0o755)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            raised = set()
            for call in CALLS:
                try:
                    call(run)
                except InputError as error:
                    raised.add("" if str(run) in str(error) else f"{call}: {error}")
                except BaseException as error:
                    raised.add(repr(error))
            os.write(write, repr(raised).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with os.fdopen(read) as told:
            assert told.read() == "{''}"


CALLS = [
    lambda run: read_run(run, 0.0),
    find_checkpoint,
    lambda run: newest(run / "checkpoints"),
    choose,
    lambda run: checkpoint_recipe(run, "ema"),
    lambda run: lock_folder(run, "another"),
    lambda run: decide(run, 0.0, 1, False, 1),
    check_run_folder,
]
