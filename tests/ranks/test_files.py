"""Writing whole or not at all: kills."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ENV, ROOT, forks, losses, small
from moe_dit.runtime.files import new_file, remove_unfinished, write_text

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
