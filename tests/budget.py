"""What keeps the suite fast and clean: a part of tests/conftest.py.

- A test in tests/unit starts no process; one in tests/ranks no Python interpreter of its own, which takes seconds to
  import torch, but has it forked (:mod:`helpers.forks`).
- The unit tests take no more CPU time together than UNIT_ADDITIONS take, which is measured between them: machines, and
  one machine beside others on its host, differ by three times.
- What the suite started is gone when it ends, and what it put into shared memory and into folders for temporary files;
  pytest keeps the folders of tests that failed. After Ctrl-C what is still there is killed.
"""

import atexit
import gc
import os
import re
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

UNIT_ADDITIONS = 8600  # millions; on 2026-11-28 they took 5300, which were 308 CPU seconds (145 on a faster machine)
MARK = "MOE_DIT_SUITE"  # environment variable that all processes of a run of the suite have
PYTHON = re.compile(r"(^|\s)([^-\s]\S*/)?(python[\d.]*|deepspeed|torchrun|srun)(\s|$)")  # not -I.../python3.11
COMPILER = "cdll.LoadLibrary("  # torch's, as it first finds out what the CPU can; it imports nothing else
STARTS = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.spawn")
LONGEST_ENDING = 60.0  # seconds that what tests started has to end after the last one, on a busy machine

_refused = ""  # what the test that runs now must not start


def may_start(line: str, forked: bool = False) -> None:
    """Refuse a command line that the test which runs now must not start."""
    starts_python = PYTHON.search(line) and not forked and COMPILER not in line
    if _refused == "process" or (_refused and starts_python):
        raise RuntimeError(f"tests/budget.py: a test in this folder starts no {_refused} of its own: {line}")


def _audit(event: str, arguments: tuple) -> None:
    if _refused and event in STARTS:
        program, words = arguments[:2]
        words = [words] if isinstance(words, (str, bytes)) else words
        may_start(" ".join(map(os.fsdecode, [program or "", *words])))


sys.addaudithook(_audit)


@contextmanager
def anything_may_start():
    """For the fork server itself."""
    global _refused
    before, _refused = _refused, ""
    try:
        yield
    finally:
        _refused = before


def _addition() -> float:
    """CPU seconds that a million additions take in plain Python, here and now."""
    before, total = time.process_time(), 0
    for number in range(500_000):
        total += number
    return 2 * (time.process_time() - before)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


class Budget:
    """One process's part of the checks; the first process adds them up."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.unit_seconds = 0.0
        self.unit_files: set[Path] = set()
        self.additions: list[float] = []
        self.wrong: list[str] = []
        self.memory = set(os.listdir("/dev/shm"))
        atexit.register(gc.freeze)  # else the last collection visits all that torch made, for a second
        if not hasattr(config, "workerinput"):
            os.environ[MARK] = secrets.token_hex(8)
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # for pytest's own
            # Torch's agents and compiler, multiprocessing and what is killed leave theirs.
            self.folder = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="moe-dit-tests-")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        global _refused
        folder = _folder(item)
        if folder == "unit":
            _refused = "process"
        elif folder == "ranks" and item.get_closest_marker("long") is None:
            _refused = "Python interpreter"
        if folder == "unit" and item.path not in self.unit_files:
            self.unit_files.add(item.path)
            self.additions.append(_addition())
        before = time.process_time()
        yield
        _refused = ""
        if folder == "unit":
            self.unit_seconds += time.process_time() - before

    def unit_budget(self) -> float:
        """CPU seconds that the unit tests may take on this machine, as fast as it was between them."""
        return UNIT_ADDITIONS * statistics.mean(self.additions) if self.additions else 0.0

    def pytest_testnodedown(self, node):
        self.unit_seconds += getattr(node, "workeroutput", {}).get("unit_seconds", 0.0)
        self.additions += getattr(node, "workeroutput", {}).get("additions", [])
        self.wrong += getattr(node, "workeroutput", {}).get("wrong", [])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session):
        if "helpers.forks" in sys.modules:
            left = sys.modules["helpers.forks"].close_all()
            self.wrong += [f"process {process} is left of what tests had forked" for process in left]
        if hasattr(self.config, "workerinput"):
            self.config.workeroutput |= {
                "unit_seconds": self.unit_seconds,
                "additions": self.additions,
                "wrong": self.wrong,
            }
            return
        if self.unit_seconds > self.unit_budget():
            self.wrong.append(f"the unit tests took {self.unit_seconds:.0f} CPU seconds of {self.unit_budget():.0f}")
        interrupted = session.exitstatus == pytest.ExitCode.INTERRUPTED
        if not interrupted:  # else no test had the time to end what it had started
            self.wrong += [f"a process is left: {line}" for line in _left()]
        _kill_all()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.wrong += [
            f"/dev/shm/{name} is left" for name in _unused(self.memory, 0 if interrupted else LONGEST_ENDING)
        ]
        if self.wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.unit_seconds:
            terminalreporter.write_line(f"unit tests: {self.unit_seconds:.0f} CPU seconds of {self.unit_budget():.0f}")
        for line in self.wrong:
            terminalreporter.write_line(f"error: {line}", red=True)


def _unused(known: set[str], patience: float) -> list[str]:
    """New names in shared memory that no process has mapped, for so long that it is no other suite's of this moment."""
    deadline = time.monotonic() + patience
    names = set(os.listdir("/dev/shm")) - known
    while names:
        maps = []
        for process in psutil.pids():
            with suppress(OSError):
                maps.append(Path(f"/proc/{process}/maps").read_text())
        names = {name for name in names if not any(f"/dev/shm/{name}" in text for text in maps)}
        names &= set(os.listdir("/dev/shm"))
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return sorted(names)


def _left() -> list[str]:
    """What else this run of the suite started, and what is still there, with their command lines."""
    deadline = time.monotonic() + LONGEST_ENDING
    while (left := list(filter(_ours, psutil.process_iter()))) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = []
    for process in left:
        try:
            found.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:200]}")
        except psutil.NoSuchProcess:
            continue
    return found


def _kill_all() -> None:
    """Until nothing is left of this run, for what is killed may have started more."""
    deadline = time.monotonic() + LONGEST_ENDING
    while (left := list(filter(_ours, psutil.process_iter()))) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)


def _ours(process: psutil.Process) -> bool:
    try:
        if process.pid == os.getpid() or process.environ().get(MARK) != os.environ[MARK]:
            return False
        # Python's own helpers, which reading shards starts, end with this process.
        return process.ppid() != os.getpid() or "from multiprocessing." not in " ".join(process.cmdline())
    except psutil.Error:
        return False
