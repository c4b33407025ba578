"""What docs/extending.md says, done in a copy of the project.

Of the page's blocks, one with ``title="FILE"`` is a new file, ``diff`` changes files, and ``bash`` holds commands,
which run as they stand, with flags after them that make them small.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from helpers import ENV, ROOT, TIMEOUT, copy_project, finish, forks, free_port
from helpers.small_runs import TINY, sets

PAGE = ROOT / "docs/extending.md"
STEPS = 4
SMALL = [*TINY, "checkpoint.every=2", "data.workers=0"]
DIGITS = [*SMALL, "model.moe.expert_width=16"]
# What DeepSpeed's launcher makes of a command line: how many ranks of what.
UNDERSTAND = """\
import json, sys
from deepspeed.launcher.runner import parse_args
args = parse_args(sys.argv[1:])
print(json.dumps([args.num_gpus, args.user_script, *args.user_args]))
"""


def sections() -> dict[str, list[tuple[str, str, str]]]:
    """The page's sections by number: blocks of (language, title, text)."""
    parts = re.split(r"^## (\d+)\..*$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    block = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    return {number: block.findall(text) for number, text in zip(parts[::2], parts[1::2], strict=True)}


class Copy:
    """A copy of the project, without what its tests are held against."""

    def __init__(self, folder: Path):
        self.folder = folder
        copy_project(folder, but="tests/")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # The ceiling: `git apply` would skip files if the copy lay in some other repository.
        self.env = ENV | {"PATH": path, "PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}

    def link(self, latents: Path) -> None:
        """Put the digits' shards where the page has them."""
        (self.folder / "data").mkdir()
        (self.folder / "data/digits_latents").symlink_to(latents)

    def extend(self, number: str) -> list[str]:
        """Do a section's changes; gives its commands."""
        commands: list[str] = []
        for language, title, text in sections()[number]:
            if title:
                assert not (self.folder / title).exists(), f"section {number}: {title} is there already"
                (self.folder / title).write_text(text)
            elif language == "diff":
                done = subprocess.run(
                    ["git", "apply", "-"], input=text, text=True, cwd=self.folder, env=self.env, capture_output=True
                )
                assert done.returncode == 0, f"{PAGE.name}, section {number}: renew its diff; {done.stderr}"
            else:
                commands += re.findall(r"(?:'[^']*'|\\\n|[^'\n])+", text)
        return commands

    def start(self, command: str, *flags: str) -> subprocess.Popen:
        """Start one of the page's commands, with more flags, output to a log; see :meth:`run`."""
        with open(self.folder / "command.log", "w") as log:
            how = {"cwd": self.folder, "env": self.env, "stdout": log, "stderr": log}
            name, *words = [*shlex.split(command.replace("\\\n", "")), *flags]
            if name == "deepspeed":
                understood = forks.run([sys.executable, "-c", UNDERSTAND, *words], stdout=subprocess.PIPE, check=True)
                ranks, *words = json.loads(understood.stdout)
                words = [str(ROOT / "tests/helpers/tasks.py"), str(ranks), str(free_port()), *words]
            else:
                assert name == "python", f"{name} is none of the commands that a test knows to start"
            return forks.Popen([sys.executable, *words], preload="libraries", **how)

    def run(self, command: str, *flags: str) -> str:
        """Run a command, which must end well; gives its output."""
        return finish(self.start(command, *flags), self.folder / "command", timeout=TIMEOUT)

    def train(self, command: str, keys: list[str], *flags: str) -> Path:
        """Run a training command for STEPS steps, with these recipe keys too; gives the run's folder."""
        self.run(command, "--steps", str(STEPS), *sets(keys), *flags)
        return self.folder / shlex.split(f"{command} {shlex.join(flags)}")[-1 if "--out" in flags else _out(command)]

    def refusal(self, command: str, *flags: str) -> str:
        """Run a command that must refuse its input: one line, exit 2, nothing written; gives the line."""
        before = {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}
        status = self.start(command, *flags).wait(timeout=TIMEOUT)
        output = (self.folder / "command.log").read_text()
        assert status == 2 and output.startswith("error: ") and output.count("\n") == 1, output
        after = {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}
        assert after - before <= {self.folder / "command.log"}
        return output

    def python(self, code: str) -> None:
        """Run Python code in the copy."""
        command = [sys.executable, "-c", code]
        forks.run(command, preload="libraries", cwd=self.folder, env=self.env, check=True, timeout=TIMEOUT)


def _out(command: str) -> int:
    return shlex.split(command).index("--out") + 1
