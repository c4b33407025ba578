"""The view of runs by itself: what it loads, and what a terminal sees of it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ENV, ROOT, TIMEOUT
from helpers.watching import hand_made


@pytest.fixture
def run(tmp_path):
    return hand_made(tmp_path)


def test_it_starts_without_torch(run):
    command = [sys.executable, "-X", "importtime", "jobs/watch.py", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rich.table" in imported and not {"torch", "deepspeed", "numpy", "matplotlib"} & imported


def test_a_terminal_sees_news_until_it_is_left(run):
    """On a terminal of 80 columns it draws again and again; Ctrl-C leaves the last picture, and no traceback."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        environment = ENV | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"}
        os.execve(sys.executable, [sys.executable, "jobs/watch.py", str(run), "--every", "0.2"], environment)
    seen = ""

    def read_until(word: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + TIMEOUT
        while word not in seen and time.monotonic() < deadline:
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
        assert word in seen

    read_until("400 / 1,000")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 777, "loss": 0.5}\n')
    read_until("777 / 1,000")
    os.kill(pid, signal.SIGINT)
    try:
        while more := os.read(terminal, 1 << 16).decode(errors="replace"):
            seen += more
    except OSError:  # the terminal's other side is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "Traceback" not in seen and "\x1b[?1049l" in seen  # back on the usual screen
    assert "777 / 1,000" in seen[seen.rindex("\x1b[?1049l") :]
