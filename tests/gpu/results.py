"""What a run of tests/gpu.sh leaves: OUT/results.jsonl, a line a check, figure or state, and OUT/summary.md made of it.

A line has part, name, value, unit, bound ("<= 2e-05"; null: a figure that nothing is asked of), ok (null without a
bound) and note. A part's states are lines too: name "state" with value "begun", "done", "failed", "hung" or "skipped".
Each run begins with a line of part "run": the digest of its code, and whether it was dry.
"""

from __future__ import annotations  # read by whatever Python is there, before .venv is

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Parts in their order, most important first, and the seconds of a whole run that each is worth.
SECONDS = {
    "machine": 8,
    "correctness": 110,
    "training": 85,
    "products": 8,
    "speed": 118,
    "profile": 25,
    "3b": 48,
    "sampling": 18,
}
# Each begins in a new process: a clean memory for speed, and nearly all of a GPU's for 3b.
FRESH = ("products", "3b")
AHEAD = "compile"  # what speed compiles, in a process of its own ...
BESIDE = ("correctness", "training")  # ... beside these


@dataclass(frozen=True)
class Line:
    """A check, a figure, or a part's state."""

    part: str
    name: str
    value: Any
    unit: str = ""
    bound: str | None = None
    ok: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        value = f"{self.value:.5g}" if isinstance(self.value, float) else str(self.value)
        asked = "" if self.bound is None else f"({self.bound})"
        sign = {None: "   ", True: "ok ", False: "OFF"}[self.ok]
        words = (sign, f"{self.part}: {self.name}:", value, self.unit, asked, self.note)
        return " ".join(word for word in words if word)


def write(out: Path, line: Line) -> None:
    """Add a line; it is on disk when this returns."""
    text = json.dumps(asdict(line) | {"time": round(time.time(), 2)}) + "\n"
    file = os.open(out / "results.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a line that was cut takes no other along
            text = "\n" + text
        # At once: several processes write, and each can be killed.
        if os.write(file, text.encode()) != len(text.encode()):
            raise OSError(errno.ENOSPC, f"{out / 'results.jsonl'} cannot be written: the disk is full")
        os.fsync(file)
    finally:
        os.close(file)


def digest(root: Path) -> str:
    """Of the project's code: by it a copy of the tree without .git is known again."""
    found = hashlib.sha256()
    for folder in ("data_prep", "ds_configs", "eval", "jobs", "moe_dit", "tests"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".sh", ".json", ".yaml"):
                found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def parsed(text: str) -> Iterator[Line]:
    """The lines of a results.jsonl; one that a full disk or a kill has cut is passed over."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            del values["time"]
            yield Line(**values)


def read(out: Path) -> list[Line]:
    """All lines; a part that was repeated counts by its last run."""
    file = out / "results.jsonl"
    lines: list[Line] = []
    for line in parsed(file.read_text()) if file.exists() else ():
        if line.name == "state" and line.value in ("begun", "skipped"):
            lines = [old for old in lines if old.part != line.part]
        lines.append(line)
    return lines


def share(part: str, parts: list[str], left: float) -> float:
    """The seconds that a part may take of those that are left for it and the parts behind it."""
    behind = parts[parts.index(part) :]
    return left * SECONDS[part] / sum(SECONDS[name] for name in behind)


def states(lines: list[Line]) -> dict[str, Line]:
    """The last state of each part that has one."""
    return {line.part: line for line in lines if line.name == "state"}


def failures(lines: list[Line]) -> list[Line]:
    """What did not hold."""
    return [line for line in lines if line.ok is False]


def facts(lines: list[Line]) -> dict[str, Any]:
    """What the machine part told in words: gpu, date, torch, commit, command and others."""
    return {line.name: line.value for line in lines if line.part == "machine" and isinstance(line.value, str)}


def summary(lines: list[Line]) -> str:
    """The results as Markdown, with what failed first."""
    known, wrong, ended = facts(lines), failures(lines), states(lines)
    checks = [line for line in lines if line.ok is not None]
    what = ", ".join(f"{key} {known[key]}" for key in ("gpu", "date", "torch", "commit") if key in known)
    text = [
        what,
        "",
        f"`{known.get('command', 'bash tests/gpu.sh')}`: {len(checks) - len(wrong)} of {len(checks)} checks hold.",
    ]
    text += [f"- {line.part}: {line.value}{', ' if line.note else ''}{line.note}" for line in ended.values()]
    text += [f"- never begun: {part}" for part in SECONDS if part not in ended]
    if wrong:
        text += ["", "What does not hold:", *(f"- {line}" for line in wrong)]
    for part in ended:
        rows = [line for line in lines if line.part == part and line.name != "state"]
        if rows:
            text += ["", f"### {part}", "", "| what | value | | asked | |", "|---|---|---|---|---|"]
        for line in rows:
            value = f"{line.value:,.5g}" if isinstance(line.value, int | float) else str(line.value)
            sign = {None: "", True: "holds", False: "**off**"}[line.ok]
            cells = (line.name, value, line.unit, line.bound or "", f"{sign} {line.note}".strip())
            text.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(text) + "\n"


def write_summary(out: Path) -> None:
    """Write OUT/summary.md anew, whole or not at all."""
    new = out / ".summary.md"
    new.write_text(summary(read(out)))
    new.replace(out / "summary.md")
