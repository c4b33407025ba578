"""Writing whole or not at all: kills, failures, and what may be replaced."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ENV, ROOT
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, new_file, new_folder, remove_unfinished, write_json, write_text

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
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE
        )
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


def test_a_block_that_fails_changes_nothing(tmp_path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path):
    ours = ["config.json", "*.safetensors"]
    (tmp_path / "model").mkdir()
    for name in ("config.json", "a.safetensors"):
        (tmp_path / "model" / name).write_text("old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"), new_folder(tmp_path / "model", ours):
        pytest.fail("the block must not begin")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    (tmp_path / "model" / "notes.txt").unlink()
    with new_folder(tmp_path / "model", ours) as folder:
        (folder / "config.json").write_text("new")
    assert [(path.name, path.read_text()) for path in (tmp_path / "model").iterdir()] == [("config.json", "new")]
    (tmp_path / "a file").touch()
    with pytest.raises(InputError, match="exists and is not a folder"), new_folder(tmp_path / "a file", ours):
        pytest.fail("the block must not begin")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the scores: Not a directory"), explained("the scores"):
        write_json(tmp_path / "file" / "scores.json", {})


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
