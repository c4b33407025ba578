"""Runs the parts of tests/gpu.sh in as few processes as survive what a GPU can do to one, under one time budget.

This process imports no torch and touches no GPU. A worker (worker.py) runs parts one after another; where one hangs it
is killed, where it dies or its CUDA context is broken, a new worker goes on with the next part.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import (
    AHEAD,
    BESIDE,
    FRESH,
    SECONDS,
    Line,
    digest,
    failures,
    parsed,
    read,
    share,
    states,
    write,
    write_summary,
)

HERE = Path(__file__).parent
PACKED = HERE.parents[1] / ".gpu"
BUDGET = 420, 175  # seconds, and those of a dry run
LEAST = 10.0  # seconds under which no part is begun
OVER = 1.5  # a part may take so much more than its share before it counts as hung ...
GRACE = 5.0  # ... and so many seconds
START = 60.0  # seconds a worker may take until a part begins


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description="Everything that needs a GPU, in one command.")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the results (default: runs/gpu, dry runs/gpu_dry)")
    parser.add_argument("--here", action="store_true", help="in the current environment, not in .venv")
    parser.add_argument("--seconds", type=float, help="for all parts (default: {}, dry {})".format(*BUDGET))
    parser.add_argument(
        "--only",
        default=",".join(SECONDS),
        metavar="PARTS",
        help="some parts, and machine, which says what ran (default: %(default)s)",
    )
    parser.add_argument("--dry", action="store_true", help="the same parts, tiny, on a CPU")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # the flags, and nothing else
    args = parser.parse_args()
    asked = args.only.split(",")
    for part in asked:
        if part not in SECONDS:
            parser.error(f"--only {part}: choose of {', '.join(SECONDS)}")
    seconds = BUDGET[args.dry] if args.seconds is None else args.seconds
    if not seconds > 0:
        parser.error(f"--seconds {seconds:g}: it should be above 0")
    if args.check:
        return 0
    args.out = args.out or Path("runs/gpu_dry" if args.dry else "runs/gpu")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "log").touch()
    except OSError as error:
        parser.error(f"{args.out} cannot be written: {error.strerror}; give another folder")
    # Told to stop, it takes its workers along, which are in process groups of their own.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    parts = [part for part in SECONDS if part in asked or part == "machine"]
    with tempfile.TemporaryDirectory(prefix="moe_dit_gpu_") as scratch:
        # Compiled kernels stay: the next run on this machine need not make them again.
        os.environ |= {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": str(PACKED / "compiled")}
        write(args.out, Line("run", "code", digest(HERE.parents[1]), note="dry" if args.dry else ""))
        Run(args.out, time.time() + seconds, args.dry).all(parts)
    write_summary(args.out)
    lines = read(args.out)
    wrong = [line for line in failures(lines) if line.part in (*parts, AHEAD)]
    done = [part for part, line in states(lines).items() if part in parts and line.value == "done"]
    print(f"{args.out / 'summary.md'}: {len(wrong)} checks do not hold; {len(done)} of {len(parts)} parts are done")
    return 1 if wrong or not done else 0


class Run:
    """Workers, one after another, until every part is settled."""

    def __init__(self, out: Path, deadline: float, dry: bool):
        self.out = out
        self.deadline = deadline
        self.dry = dry
        self._ahead: subprocess.Popen | None = None
        self._read = (out / "results.jsonl").stat().st_size if (out / "results.jsonl").exists() else 0

    def all(self, todo: list[str]) -> None:
        """Run these parts in their order."""
        try:
            while todo:
                if time.time() > self.deadline - LEAST:
                    self._settle(todo.pop(0), "skipped", "no time was left")
                    continue
                end = next((i for i, part in enumerate(todo) if i and part in FRESH), len(todo))
                todo = todo[self._watch(todo[:end], todo) :]
                write_summary(self.out)
        finally:
            self._compile_ahead(None, [])
        self._new_lines()

    def _compile_ahead(self, part: str | None, todo: list[str]) -> None:
        """As a part begins: what speed compiles is compiled beside parts that measure no time, and only there."""
        if part in BESIDE and self._ahead is None and "speed" in todo:
            self._ahead = self._start([AHEAD], [AHEAD])
        if part not in BESIDE and self._ahead is not None:
            _end(self._ahead)
            self._ahead = None

    def _start(self, parts: list[str], todo: list[str]) -> subprocess.Popen:
        """A worker in a process group of its own; what it prints goes to OUT/log."""
        command = [sys.executable, str(HERE / "worker.py"), str(self.out), ",".join(parts), ",".join(todo)]
        command += [str(self.deadline), *(["--dry"] if self.dry else [])]
        with open(self.out / "log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _watch(self, parts: list[str], todo: list[str]) -> int:
        """Have a worker run some parts, the first of those to do; how many of them that settled."""
        worker = self._start(parts, todo)
        settled, begun = 0, False
        began = time.time()
        limit = began + START
        try:
            while settled < len(parts):
                ended = worker.poll() is not None  # before its last lines are read
                for line in self._new_lines():
                    if settled == len(parts) or line.name != "state" or line.part != parts[settled]:
                        continue
                    began, begun = time.time(), line.value == "begun"
                    limit = began + START
                    if begun:
                        self._compile_ahead(line.part, todo)
                        limit = began + OVER * share(line.part, todo, self.deadline - began) + GRACE
                    else:
                        settled += 1
                        write_summary(self.out)
                if settled == len(parts) or (ended and not begun and settled):  # a context that broke: the rest anew
                    break
                if not begun and time.time() > self.deadline:
                    return settled  # what is left to do is skipped
                if ended or time.time() > min(limit, self.deadline):
                    self._fail(parts[settled], worker, began)
                    return settled + 1
                time.sleep(0.1)
            return settled
        finally:
            _end(worker)

    def _fail(self, part: str, worker: subprocess.Popen, began: float) -> None:
        """Say that a part hangs, or has ended its worker."""
        hangs = worker.poll() is None
        why = "it did not end by itself" if hangs else f"its process ended with status {worker.returncode}"
        write(self.out, Line(part, "the part", "ends", bound="by itself", ok=False, note=why))
        self._settle(part, "hung" if hangs else "failed", f"{why}, {time.time() - began:.0f} s")

    def _settle(self, part: str, state: str, note: str) -> None:
        write(self.out, Line(part, "state", state, note=note))

    def _new_lines(self) -> list[Line]:
        """The whole lines that have come since the last time; they are shown."""
        file = self.out / "results.jsonl"
        if not file.exists():
            return []
        with open(file, "rb") as results:
            results.seek(self._read)
            text = results.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = list(parsed(whole.decode()))
        for line in lines:
            print(line, flush=True)
        return lines


def _end(worker: subprocess.Popen) -> None:
    """Kill a worker and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver, where no signal reaches it
        worker.wait(10)


if __name__ == "__main__":
    sys.exit(main())
