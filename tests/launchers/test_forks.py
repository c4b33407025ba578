"""What the fork server forks ends, answers and stops as a Python of its own does, and nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from helpers import ROOT, TIMEOUT, forks, wait_for

FORKED = partial(forks.Popen, preload="nothing")
TRUE = partial(subprocess.Popen, start_new_session=True)
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(sys.argv, __name__, sys.stdin.read()); print('err', file=sys.stderr)",
        "import os; print(os.getcwd(), sorted(os.environ), os.getsid(0) == os.getpid(), os.getppid())",
        "import sys; print(sys.dont_write_bytecode)",
        "import sys; sys.exit()",
        "import sys; sys.exit(75)",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit('a line')",
        "def f(): return 1 / 0\nf()",
        "raise KeyboardInterrupt",
        "import os; os._exit(7)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'at exit'); print('before')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
        "import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
        "import os; os.write(1, b'' if os.fork() else b'child'); os._exit(0)",
        "import __main__, pickle; C = type('C', (), {}); print(pickle.loads(pickle.dumps(C)) is C, __main__.C is C)",
    ],
)
def test_it_is_what_python_would_be(tmp_path, code):
    found = []
    for start in (TRUE, FORKED):
        command = [sys.executable, "-c", code, "one", "two words"]
        process = start(command, cwd=tmp_path, env={"LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}, **PIPES)
        out, err = process.communicate("given", timeout=TIMEOUT)
        # of a traceback the server's own frames are not Python's
        found.append((process.returncode, out, [line for line in err.splitlines() if not line.startswith("  ")]))
    assert found[0] == found[1]


@pytest.mark.parametrize("command", [["script.py"], ["-m", "package.module"], ["folder/script.py"]])
def test_scripts_and_modules(tmp_path, command):
    code = (
        "import sys\nprint(__name__, __spec__ and __spec__.name, sys.argv[1:], sys.path[0], 'package.x' in sys.modules)"
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "folder").mkdir()
    for name in ("script.py", "folder/script.py", "package/module.py"):
        (tmp_path / name).write_text(code)
    found = [start([sys.executable, *command, "a"], cwd=tmp_path, **PIPES) for start in (TRUE, FORKED)]
    assert found[0].communicate(timeout=TIMEOUT) == found[1].communicate(timeout=TIMEOUT)


def test_it_can_be_stopped_continued_and_killed():
    process = FORKED([sys.executable, "-c", "import time\nwhile True: time.sleep(0.01)"])
    seen = psutil.Process(process.pid)
    wait_for(lambda: " ".join(seen.cmdline()).startswith(f"{sys.executable} -c import"), "its title", None)
    assert seen.ppid() == os.getpid()
    for number, state in ((signal.SIGSTOP, psutil.STATUS_STOPPED), (signal.SIGCONT, psutil.STATUS_SLEEPING)):
        process.send_signal(number)
        wait_for(lambda state=state: seen.status() == state, f"{seen} {state}", None)
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGSTOP)
    process.kill()
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)


SLEEPERS = """\
import os, sys, time
pid = os.fork()
os.write(1, b"%d %d\\n" % (os.getpid(), pid))
time.sleep(1000)
"""


def test_what_takes_too_long_is_killed_with_all_that_it_started():
    for timeout in (1, 10, 100):  # until both have begun
        with pytest.raises(subprocess.TimeoutExpired) as ended:
            command = [sys.executable, "-c", SLEEPERS]
            forks.run(command, preload="nothing", timeout=timeout, capture_output=True, text=True)
        started = {int(word) for word in (ended.value.stdout or b"").decode().split()} - {0}
        if len(started) == 2:
            break
    assert len(started) == 2
    wait_for(lambda: not any(map(running, started)), f"{started} end", None)


def running(number: int) -> bool:
    """Whether there is such a process, one that ended and is not asked after aside."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


CLIENT = """\
import os, sys
from helpers import forks
process = forks.Popen([sys.executable, "-c", sys.argv[1]], preload="nothing")
print(process.pid, forks.server("nothing")._process.pid, flush=True)
process.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_when_who_asked_is_gone_all_is(number):
    """A session of its own is not reached by a terminal's Ctrl-C, nor by anybody who kills a test."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    code = [sys.executable, "-c", CLIENT, SLEEPERS]
    with forks.Popen(code, preload="libraries", env=environment, stdout=subprocess.PIPE, text=True) as client:
        words = [*client.stdout.readline().split(), *client.stdout.readline().split()]
        client.stdout.readline()
        client.send_signal(number)
        assert client.wait(TIMEOUT) in (-number, 1)
    started = {int(word) for word in words} - {0}
    wait_for(lambda: not any(map(running, started)), f"{started} end", None)


THREADS = """\
import sys
from concurrent.futures import ThreadPoolExecutor
from helpers import forks
with ThreadPoolExecutor(8) as pool:
    exit = lambda n: forks.run([sys.executable, "-c", f"raise SystemExit({n})"], preload="nothing")
    ended = pool.map(exit, range(64))
    assert [process.returncode for process in ended] == list(range(64))
print("threads:", len(forks._servers))
"""


def test_threads_may_fork_at_once_from_the_beginning():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    code = [sys.executable, "-c", THREADS]
    done = forks.run(code, preload="libraries", env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.stdout, done.returncode) == ("threads: 1\n", 0), done.stderr


def test_what_is_left_is_known():
    """What has ended and is not asked after is not left."""
    ended = FORKED([sys.executable, "-c", ""])
    started = FORKED([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, text=True)
    words = started.stdout.readline().split() + started.stdout.readline().split()
    wait_for(lambda: not running(ended.pid), "the first ends", None)
    left = set(map(int, words)) - {0}
    assert set(forks.server("nothing").left()) == left and len(left) == 2
    forks.kill(started)
    wait_for(lambda: not forks.server("nothing").left(), "they end", None)
    started.stdout.close()
    assert ended.wait() == 0


def test_what_is_not_python_or_needs_the_new_process_is_refused():
    for command, options in ((["true"], {}), ([sys.executable, "-c", ""], {"preexec_fn": time.time})):
        with pytest.raises(ValueError, match="only python's command lines can be forked"):
            forks.Popen(command, preload="nothing", **options)
