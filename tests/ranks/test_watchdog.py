"""Ranks that wait: who waits where is said in a line, of real runs too, which go on as if nothing had been."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from helpers import (
    ENV,
    ROOT,
    TIMEOUT,
    forks,
    free_port,
    kill,
    losses,
    records,
    run_scripts,
    small,
    wait_for,
    wait_for_step,
)
from helpers.small import flags_of
from moe_dit.events import events

HOST = socket.gethostname()


# Ranks may answer each other late, and the check before the first step is not one that ends the run.
PATIENT = """
import moe_dit.watchdog
moe_dit.watchdog.WINDOW_SECONDS = 6.0
sign = moe_dit.watchdog.Watchdog.sign
moe_dit.watchdog.Watchdog.sign = lambda dog, what, step=0, ends=False: sign(dog, what, step)
"""


def start(size: int, run: Path, *flags: str, code: str = "") -> list[subprocess.Popen]:
    """Ranks of the training command that first run some code, each started by itself; output goes to RUN.log."""
    command = [sys.executable, "-c", PATIENT + code + small.RUN_TRAINING]
    command += [*flags_of(run, "zero2_ep2" if size == 2 else "zero1_ep1"), "--steps=100000", *flags]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"MOE_DIT_PATIENCE_SECONDS": "12"}  # a busy machine may take some for a step
    with open(f"{run}.log", "a") as log:
        each = [ENV | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [forks.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log) for env in each]


# Rank 1 sleeps half a second a batch, and before the 13th until all have said that nothing moves. By a clock that knows
# of work and of these sleeps, and of nothing that a busy machine adds.
SLEEPY = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import moe_dit.metrics, moe_dit.runtime.clock, moe_dit.times, moe_dit.train
moe_dit.metrics.LOAD_EVERY = moe_dit.times.LOAD_EVERY = moe_dit.train.LOAD_EVERY = 5
from moe_dit.data.reader import ShardReader
from moe_dit.runtime import ranks
read, calls, slept = ShardReader.read, 0, 0.0
run = Path(sys.argv[sys.argv.index("--out") + 1])
told = {"events.jsonl": "hang", "logs/rank_00000.log": "Current thread", "logs/rank_00001.log": "Current thread"}
def silent():
    return any(word not in (run / name).read_text() for name, word in told.items())
def slow(reader, *which):
    global calls, slept
    calls += 1
    if ranks.world().rank == 1:
        time.sleep(0.5)
        slept += 0.5
        began = time.monotonic()
        while calls == 13 and silent() and time.monotonic() < began + 300:
            time.sleep(0.1)
        slept += time.monotonic() - began
    return read(reader, *which)
ShardReader.read = slow
clock = SimpleNamespace(**vars(time) | {"perf_counter": lambda: time.process_time() + slept})
moe_dit.times.time = moe_dit.train.time = moe_dit.runtime.clock.time = clock
"""


def test_a_rank_that_is_slow_or_stuck_in_reading_is_named(shared, tmp_path):
    run, alone = tmp_path / "run", small.on_two_ranks(shared)
    processes = start(2, run, "--steps=20", code=SLEEPY)
    try:
        assert [process.wait(TIMEOUT) for process in processes] == [0, 0], Path(f"{run}.log").read_text()[-3000:]
    finally:
        for process in processes:
            kill(process)
    log = Path(f"{run}.log").read_text()
    told = [(event["what"], event["step"], event["message"]) for event in events(run)]
    assert [what for what, *_ in told] == ["started", "straggler", "hang", "hang", "done"]
    assert told[1][1] == 10 and told[1][2] in log
    pattern = (
        rf"step 10: rank 1 \({HOST}\) takes \S+ s to its first collective of each step, others \S+: (\S+) s of them"
    )
    found = re.match(pattern, told[1][2])
    assert found is not None and 0.5 <= float(found[1]) < 2.5  # a step's, not five steps'
    line = rf"no step for \d+ s, at step 13: rank 0 \({HOST}\) waits in (\w+) \([\w.]+\); "
    assert told[2][1] == 12
    assert re.fullmatch(line + rf"rank 1 \({HOST}\) waits for data in loader\.__getitems__", told[2][2]), told[2][2]
    assert re.fullmatch(r"moving again after \d+ s", told[3][2])
    assert log.count(told[2][2]) == 1 and log.count("moving again") == 1
    # What is watched is not changed: as the run without, to the last bit.
    assert losses(run)[:12] == losses(alone)
    assert losses(run, "grad_norm")[:12] == losses(alone, "grad_norm")
    slowest = {record["step"]: record for record in records(run) if "slowest_rank" in record}
    assert list(slowest) == [5, 10, 15, 20]
    assert [record["slowest_rank"] for record in slowest.values()] == [1, 1, 1, 1]
    assert 0.3 < slowest[10]["slowest_rank_excess"] < 2.5
    assert slowest[15]["slowest_rank_excess"] > 2.0  # 12 s in five steps
    times = json.loads((run / "ranks.json").read_text())
    assert list(times) == ["step", "time", "hosts", "seconds", "data", "compute", "exchange", "memory_gb"]
    assert times["step"] == 20 and times["hosts"] == [HOST, HOST] and abs(times["time"] - time.time()) < 300
    for rank in range(2):
        for key in ("seconds", "compute", "exchange"):
            assert 0 < times[key][rank] < 20
        assert times["compute"][rank] + times["exchange"][rank] + times["data"][rank] < times["seconds"][rank]
        assert 0.1 < times["memory_gb"][rank] < 10
    assert 0.5 <= times["data"][1] < 2.5 and times["data"][0] < times["data"][1] / 2
    for rank in range(2):
        lines = (run / f"logs/rank_{rank:05d}.log").read_text()
        assert f"start on {HOST}, process {processes[rank].pid}, device cpu, torch {torch.__version__}" in lines
        assert re.search(r"Z step 20: seconds \S+, data \S+, compute \S+, exchange \S+, memory_gb \S+\n", lines)
        assert re.search(r"no sign for \d+ s, after step 12: ", lines) and "Current thread" in lines
        assert "moe_dit/train.py" in lines and lines.rstrip().endswith("Z end")


def test_a_rank_that_is_stopped_is_named(tmp_path):
    run = tmp_path / "run"
    processes = start(3, run, "--set=global_batch_size=33", "--set=model.depth=1", "--set=checkpoint.every=50000")
    try:
        wait_for_step(run, 3, processes[0])
        processes[2].send_signal(signal.SIGSTOP)
        wait_for(lambda: "hang" in (run / "events.jsonl").read_text(), "a line", Path(f"{run}.log"))
        told = [event for event in events(run) if event["what"] == "hang"]
        processes[2].send_signal(signal.SIGCONT)
        step = told[0]["step"]
        wait_for(lambda: "moving again" in (run / "events.jsonl").read_text(), "another", Path(f"{run}.log"))
        wait_for_step(run, step + 5, processes[0])
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(TIMEOUT) for process in processes] == [75, 75, 75]
    finally:
        for process in processes:
            kill(process)
    waiting = rf"ranks 0, 1 \({HOST}\) wait in \w+ \([\w.]+\); rank 2 \({HOST}\) does not answer"
    assert re.fullmatch(rf"no step for \d+ s, at step {step + 1}: {waiting}", told[0]["message"]), told[0]["message"]
    assert [event["what"] for event in events(run)] == ["started", "hang", "hang", "stopped"]


GONE = """
import os, time
from pathlib import Path
import torch
import moe_dit.watchdog
from moe_dit.runtime import joining
from moe_dit.runtime.rank_log import RankLog
moe_dit.watchdog.WINDOW_SECONDS = 0.5
run = Path("run")
run.mkdir(exist_ok=True)
torch.distributed.barrier()
(run / f"left_{rank}").touch()
said = []
with RankLog(run, torch.device("cpu")) as log:
    while rank == 0:
        if all((run / f"left_{other}").exists() for other in (1, 2)):
            os._exit(0)
        time.sleep(0.01)
    while joining._answers():
        time.sleep(0.01)
    watch = moe_dit.watchdog.Watchdog(log, lambda *told: said.append(told), 0.5, False)
    watch.sign("step", 7)
    while "no sign for" not in (run / f"logs/rank_0000{rank}.log").read_text():
        time.sleep(0.05)
    watch.close()
    watch._thread.join()
print(said, flush=True)
os._exit(0)
"""


def test_without_rank_0_another_speaks(tmp_path):
    _, first, second = run_scripts(GONE, 3, tmp_path)
    line = rf"no step for \d+ s, at step 8: rank 1 \({HOST}\) is in command.run; "
    line += rf"rank 0 \({HOST}\), which keeps what ranks tell each other, does not answer"
    assert re.fullmatch(rf"\[\('{line}', 7, False\)\]", first.stdout.strip()), first.stdout
    assert second.stdout.strip() == "[]"


# Rank 1 is watched once rank 0 has seen that nothing moves, and rank 0 goes, with what ranks tell each other, once
# rank 1 has read of it.
DEADLINE = """
import threading, time
from pathlib import Path
from moe_dit.runtime.rank_log import RankLog
from moe_dit.watchdog import Watchdog
import torch
run = Path("run")
run.mkdir(exist_ok=True)
def until(true):
    while not true():
        time.sleep(0.05)
def tell(*told):
    until((run / "read").exists)
    print(*told, flush=True)
def collect(watch, *given, collect=Watchdog._collect):
    states = collect(watch, *given)
    if rank == 1:
        (run / "read").touch()
    return states
Watchdog._collect = collect
with RankLog(run, torch.device("cpu")) as log:
    torch.distributed.barrier()  # a rank that comes seconds later than the other is not silent
    if rank == 1:
        until(lambda: "no sign for" in (run / "logs/rank_00000.log").read_text())
    watch = Watchdog(log, tell, 1.0, False)
    watch._window = 120 if rank == 0 else watch._window
    watch.sign("the check before the first step", ends=True)
    threading.Event().wait() if rank == 1 else torch.distributed.all_reduce(torch.ones(1))
"""


def test_a_check_that_hangs_ends_all_with_a_line(tmp_path):
    first, second = run_scripts(DEADLINE, 2, tmp_path)
    assert (first.returncode, second.returncode, second.stdout) == (1, 1, "")
    line = r"no step for \d+ s, in the check before the first step: "
    line += rf"rank 0 \({HOST}\) waits in all_reduce \(command\.run\); "
    assert re.fullmatch(line + rf"rank 1 \({HOST}\) is in command\.run 0 True\n", first.stdout), first.stdout


# Rank 1 is busy in Python for longer than ranks may be silent, its process is stopped for a while, and then rank 2 is
# gone. What says so never comes back: a full pipe, a disk that does not answer.
SILENT = """
import os, signal, threading, time
from pathlib import Path
import torch
def tell(line):
    print(line, flush=True)
    Path("told").touch()
    threading.Event().wait()
gone = ranks.silence()
gone.tell = tell
numbers = [None] * 3
torch.distributed.all_gather_object(numbers, os.getpid())
if rank == 1:
    time.sleep(12)
torch.distributed.barrier()
if rank == 0:
    os.kill(numbers[1], signal.SIGSTOP)
    time.sleep(4)
    os.kill(numbers[1], signal.SIGCONT)
torch.distributed.barrier()
print("all are there", flush=True)
if rank == 2:
    gone._closed.set()
    while not Path("told").exists():
        time.sleep(0.05)
    for _ in range(100):
        time.sleep(0.1)
        alive = [number for number in numbers[:2] if Path(f"/proc/{number}").exists()]
    for number in alive:
        os.kill(number, signal.SIGKILL)
    os._exit(0)
threading.Event().wait()
"""


def test_a_rank_that_is_gone_ends_the_others_whatever_blocks(tmp_path):
    first, second, third = run_scripts(SILENT, 3, tmp_path, MOE_DIT_SILENCE_SECONDS="10")
    assert [done.returncode for done in (first, second, third)] == [1, 1, 0], first.stderr + second.stderr
    line = rf"rank 2 \({HOST}\) has been silent for \d+ s: the node or the network is gone, .*\n"
    assert re.fullmatch("all are there\n" + line, first.stdout), first.stdout
    assert (second.stdout, third.stdout) == ("all are there\n", "all are there\n")
