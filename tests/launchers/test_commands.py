"""Every command through a shell and a new interpreter, which imports what it says it needs and no more."""

import re
import subprocess
import sys

import pytest

from helpers import ENV, ROOT, project_files

COMMANDS = [
    *("jobs/bench.py", "jobs/export.py", "jobs/import_reference.py", "jobs/plan.py", "jobs/submit.py", "jobs/train.py"),
    *("jobs/upcycle.py", "jobs/watch.py", "-m eval.atlas", "-m eval.reference", "-m eval.report", "-m eval.run"),
    *("-m eval.sample", "-m eval.score", "-m eval.sweep", "-m data_prep.bench", "-m data_prep.digits"),
    *("-m data_prep.encode_latents", "-m data_prep.fetch", "-m data_prep.index", "-m data_prep.pack_pixels"),
    "-m data_prep.verify",
]


def test_these_are_all_commands():
    """But for the one that a job script calls."""
    found = [name for name in project_files() if re.match(r"(jobs|eval|data_prep|moe_dit)/.*\.py", name)]
    found = [name for name in found if '__name__ == "__main__"' in (ROOT / name).read_text()]
    named = [name if name.startswith("jobs/") else f"-m {name[:-3].replace('/', '.')}" for name in found]
    assert sorted(named) == sorted([*COMMANDS, "-m moe_dit.cluster.job"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_line_is_one_line_and_status_2(command):
    line = f'set -o pipefail; "{sys.executable}" {command} --nonsense | cat; echo status $?'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.stdout == "status 2\n"
    assert re.fullmatch(r"error: [^\n]*; see --help\n", done.stderr), done.stderr
