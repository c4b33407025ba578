"""Every command by itself, through a shell and a new interpreter: it imports what it needs."""

import re
import subprocess
import sys

import pytest

from helpers import ENV, ROOT, TIMEOUT, forks, project_files

COMMANDS = [
    *("jobs/bench.py", "jobs/export.py", "jobs/import_reference.py", "jobs/plan.py", "jobs/submit.py", "jobs/train.py"),
    *("jobs/upcycle.py", "jobs/watch.py", "-m eval.atlas", "-m eval.reference", "-m eval.report", "-m eval.run"),
    *("-m eval.sample", "-m eval.score", "-m eval.sweep", "-m data_prep.bench", "-m data_prep.digits"),
    *("-m data_prep.encode_latents", "-m data_prep.fetch", "-m data_prep.index", "-m data_prep.pack_pixels"),
    "-m data_prep.verify",
]


def test_these_are_all_commands():
    """But for those that job scripts call."""
    found = [name for name in project_files() if re.match(r"(jobs|eval|data_prep|moe_dit)/.*\.py", name)]
    found = [name for name in found if '__name__ == "__main__"' in (ROOT / name).read_text()]
    named = [name if name.startswith("jobs/") else f"-m {name[:-3].replace('/', '.')}" for name in found]
    assert sorted(named) == sorted([*COMMANDS, "-m moe_dit.cluster.job", "-m moe_dit.cluster.newest"])


def one_line(done: subprocess.CompletedProcess) -> bool:
    return re.fullmatch(r"error: [^\n]*; see --help\n", done.stderr) is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_line_is_one_line_and_status_2(command):
    """Of the project nothing has been imported before; the libraries have, which take four seconds each time."""
    line = [sys.executable, *command.split(), "--nonsense"]
    done = forks.run(line, preload="libraries", cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done), done.stderr


FEW = ("jobs/train.py", "jobs/watch.py", "-m eval.report", "-m eval.score", "-m data_prep.index")


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name in FEW else pytest.mark.long) for name in COMMANDS]
)
def test_a_shell_sees_one_line_and_status_2(command):
    """And a new interpreter imports what the command needs."""
    line = f'set -o pipefail; "{sys.executable}" {command} --nonsense | cat; echo status $?'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout == "status 2\n"
    assert one_line(done), done.stderr
