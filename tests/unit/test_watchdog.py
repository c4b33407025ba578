"""Ranks that wait: who waits where is said in a line, of real runs too, which go on as if nothing had been."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from helpers import ENV, ROOT, STEPS, free_port, kill, losses, records, run_scripts, wait_for_step
from moe_dit.events import events
from moe_dit.runtime import rank_log
from moe_dit.runtime.rank_log import RankLog
from moe_dit.status import read_status
from moe_dit.times import RankTimes, StepTimes
from moe_dit.train import _Told
from moe_dit.watchdog import Sign, Watchdog, standing, unfinished

HOST = socket.gethostname()
CPU = torch.device("cpu")


# --- real runs --------------------------------------------------------------------------------------------------------


def start(script: str, size: int, latents: Path, run: Path, *flags: str, **env: str) -> list[subprocess.Popen]:
    """Ranks of the training command, or of a script that ends in it, each started by itself; output goes to RUN.log."""
    command = [sys.executable, script, "--ds", f"ds_configs/{'zero2_ep2' if size == 2 else 'zero1_ep1'}.json"]
    command += ["--recipe", "digits", "--data", str(latents), "--out", str(run), "--set", "data.workers=0", *flags]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with open(f"{run}.log", "a") as log:
        return [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=ENV | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)} | env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for rank in range(size)
        ]


SLEEPY = """\
import runpy, sys, time
from pathlib import Path
import moe_dit.times
moe_dit.times.LOAD_EVERY = 5
from moe_dit.data.reader import ShardReader
from moe_dit.runtime import ranks
read, calls = ShardReader.read, 0
told = Path(sys.argv[sys.argv.index("--out") + 1]) / "events.jsonl"
def slow(reader, *which):
    global calls
    calls += 1
    if ranks.world().rank == 1:
        time.sleep(0.4)
        deadline = time.monotonic() + 60
        while calls == 13 and "hang" not in told.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
    return read(reader, *which)
ShardReader.read = slow
runpy.run_path("jobs/train.py", run_name="__main__")
"""


def test_a_rank_that_is_slow_or_stuck_in_reading_is_named(two_ranks, latents, tmp_path):
    script, run = tmp_path / "sleepy.py", tmp_path / "run"
    script.write_text(SLEEPY)
    processes = start(str(script), 2, latents, run, "--steps", "20", MOE_DIT_PATIENCE_SECONDS="2")
    try:
        assert [process.wait(240) for process in processes] == [0, 0], Path(f"{run}.log").read_text()[-3000:]
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
    assert found is not None and 0.4 <= float(found[1]) < 0.8
    line = rf"no step for \d+ s, at step 13: rank 0 \({HOST}\) waits in (\w+) \([\w.]+\); "
    assert told[2][1] == 12
    assert re.fullmatch(line + rf"rank 1 \({HOST}\) waits for data in loader\._batch", told[2][2]), told[2][2]
    assert re.fullmatch(r"moving again after \d+ s", told[3][2])
    assert log.count(told[2][2]) == 1 and log.count("moving again") == 1
    # What is watched is not changed: as the run without, to the last bit.
    assert losses(run)[:STEPS] == losses(two_ranks)
    assert losses(run, "grad_norm")[:STEPS] == losses(two_ranks, "grad_norm")
    slowest = {record["step"]: record for record in records(run) if "slowest_rank" in record}
    assert list(slowest) == [5, 10, 15, 20]
    assert [record["slowest_rank"] for record in slowest.values()] == [1, 1, 1, 1]
    assert 0.2 < slowest[10]["slowest_rank_excess"] < 0.8 and slowest[15]["slowest_rank_excess"] > 1
    times = json.loads((run / "ranks.json").read_text())
    assert list(times) == ["step", "time", "hosts", "seconds", "data", "compute", "exchange", "memory_gb"]
    assert times["step"] == 20 and times["hosts"] == [HOST, HOST] and abs(times["time"] - time.time()) < 300
    for rank in range(2):
        for key in ("seconds", "compute", "exchange"):
            assert 0 < times[key][rank] < 20
        assert times["compute"][rank] + times["exchange"][rank] + times["data"][rank] < times["seconds"][rank]
        assert 0.1 < times["memory_gb"][rank] < 10
    assert 0.4 <= times["data"][1] < 0.8 and times["data"][0] < 0.2
    for rank in range(2):
        lines = (run / f"logs/rank_{rank:05d}.log").read_text()
        assert f"start on {HOST}, process {processes[rank].pid}, device cpu, torch {torch.__version__}" in lines
        assert re.search(r"Z step 20: seconds \S+, data \S+, compute \S+, exchange \S+, memory_gb \S+\n", lines)
        assert re.search(r"no sign for \d+ s, after step 12: ", lines) and "Current thread" in lines
        assert "moe_dit/train.py" in lines and lines.rstrip().endswith("Z end")


def test_a_rank_that_is_stopped_is_named(latents, tmp_path):
    run = tmp_path / "run"
    processes = start("jobs/train.py", 3, latents, run, "--steps", "400", "--set", "global_batch_size=33",
                      "--set", "model.depth=1", MOE_DIT_PATIENCE_SECONDS="3")  # fmt: skip
    try:
        wait_for_step(run, 3, processes[0])
        processes[2].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not (told := [event for event in events(run) if event["what"] == "hang"]):
            assert time.monotonic() < deadline, Path(f"{run}.log").read_text()[-3000:]
            time.sleep(0.2)
        processes[2].send_signal(signal.SIGCONT)
        step = told[0]["step"]
        wait_for_step(run, step + 5, processes[0])
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [75, 75, 75]
    finally:
        for process in processes:
            kill(process)
    waiting = rf"ranks 0, 1 \({HOST}\) wait in \w+ \([\w.]+\); rank 2 \({HOST}\) does not answer"
    assert re.fullmatch(rf"no step for \d+ s, at step {step + 1}: {waiting}", told[0]["message"]), told[0]["message"]
    assert [event["what"] for event in events(run)] == ["started", "hang", "hang", "stopped"]


# --- who speaks -------------------------------------------------------------------------------------------------------

GONE = """
import os, time
from pathlib import Path
import torch
from moe_dit.runtime.rank_log import RankLog
from moe_dit.watchdog import Watchdog
run = Path("run")
run.mkdir(exist_ok=True)
torch.distributed.barrier()
said = []
with RankLog(run, torch.device("cpu")) as log:
    watch = Watchdog(log, lambda *told: said.append(told), 1.0, False)
    watch.sign("step", 7)
    if rank == 0:
        time.sleep(1)
        os._exit(0)
    time.sleep(20)
print(said)
os._exit(0)
"""


def test_without_rank_0_another_speaks(tmp_path):
    _, first, second = run_scripts(GONE, 3, tmp_path)
    line = rf"no step for \d+ s, at step 8: rank 1 \({HOST}\) is in command.run; "
    line += rf"rank 0 \({HOST}\), which keeps what ranks tell each other, does not answer"
    assert re.fullmatch(rf"\[\('{line}', 7, False\)\]", first.stdout.strip()), first.stdout
    assert second.stdout.strip() == "[]"


DEADLINE = """
import os, time
from pathlib import Path
from moe_dit.runtime.rank_log import RankLog
from moe_dit.watchdog import Watchdog
import torch
run = Path("run")
run.mkdir(exist_ok=True)
with RankLog(run, torch.device("cpu")) as log:
    watch = Watchdog(log, lambda *told: print(*told, flush=True), 2.0, False)
    torch.distributed.barrier()  # a rank that comes seconds later than the other is not silent
    watch.sign("the check before the first step", ends=True)
    time.sleep(100) if rank == 1 else torch.distributed.all_reduce(torch.ones(1))
"""


def test_a_check_that_hangs_ends_all_with_a_line(tmp_path):
    first, second = run_scripts(DEADLINE, 2, tmp_path)
    assert (first.returncode, second.returncode, second.stdout) == (1, 1, "")
    line = r"no step for \d+ s, in the check before the first step: "
    line += rf"rank 0 \({HOST}\) waits in all_reduce \(command\.run\); "
    assert re.fullmatch(line + rf"rank 1 \({HOST}\) is in command\.run 0 True\n", first.stdout), first.stdout


def test_what_ends_a_job_is_in_its_status(tmp_path, capsys):
    told = _Told(tmp_path)
    told.stands_still("no step for 120 s", 0, True)
    assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["message"] == "no step for 120 s"
    told.stands_still("no step for 121 s", 7, False)
    assert [(event["what"], event["step"]) for event in events(tmp_path)] == [("failed", 0), ("hang", 7)]
    assert capsys.readouterr().err == "no step for 120 s\nno step for 121 s\n"


# --- where a thread stands --------------------------------------------------------------------------------------------


def calling(*places: str):
    """A function that calls through functions of these modules ("module:function"), and the innermost waits."""
    inner = None
    for place in reversed(places):
        module, name = place.split(":")
        space = {"__name__": module, "inner": inner}
        exec(f"def {name}(wait):\n    return inner(wait) if inner else wait()", space)
        inner = space[name]
    return inner


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["moe_dit.parallel.expert_layers:exchange", "deepspeed.module_inject.auto_ep_layer:forward",
          "deepspeed.comm.comm:all_to_all_single", "deepspeed.comm.torch:all_to_all_single",
          "torch.distributed.distributed_c10d:all_to_all_single"],
         "waits in all_to_all_single (expert_layers.exchange)"),
        (["moe_dit.train:train", "moe_dit.runtime.ranks:from_rank_0", "torch.distributed.c10d_logger:wrapper",
          "torch.distributed.distributed_c10d:broadcast_object_list", "torch.distributed.c10d_logger:wrapper",
          "torch.distributed.distributed_c10d:broadcast"], "waits in broadcast_object_list (ranks.from_rank_0)"),
        # A collective's own callback is not part of it: what is innermost counts.
        (["torch.distributed.distributed_c10d:barrier", "moe_dit.checkpoint:save",
          "torch.distributed.distributed_c10d:all_reduce"], "waits in all_reduce (checkpoint.save)"),
        (["moe_dit.train:_loop", "moe_dit.train:__next__", "moe_dit.data.reader:_read", "posix:read"],
         "waits for data in reader._read"),
        (["moe_dit.train:_loop", "moe_dit.engine:train_step", "torch.cuda:synchronize"], "is in engine.train_step"),
        (["__main__:main"], "is in Python"),
    ],
)  # fmt: skip
def test_where_a_thread_stands(places, words):
    begun, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=calling(*places), args=(lambda: (begun.set(), over.wait()),))
    thread.start()
    begun.wait()
    try:
        assert standing(sys._current_frames()[thread.ident]) == words
    finally:
        over.set()
        thread.join()


def test_the_oldest_collective_that_a_gpu_has_not_finished(monkeypatch):
    entries = [
        {"record_id": 9, "profiling_name": "nccl:all_reduce", "collective_seq_id": 41, "state": "scheduled"},
        {"record_id": 8, "profiling_name": "nccl:all_to_all", "collective_seq_id": 40, "state": "started"},
        {"record_id": 7, "profiling_name": "nccl:broadcast", "collective_seq_id": 39, "state": "completed"},
    ]
    name = "_dump_nccl_trace_json"
    monkeypatch.setattr(torch._C._distributed_c10d, name, lambda **_: json.dumps({"entries": entries}), raising=False)
    assert unfinished() == "nccl:all_to_all number 40"
    entries.clear()
    assert unfinished() == ""
    monkeypatch.delattr(torch._C._distributed_c10d, name)
    assert unfinished() == ""


def test_how_long_is_too_long(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    now = 100.0
    monkeypatch.setattr("moe_dit.watchdog.time.monotonic", lambda: now)
    watch = Watchdog(RankLog(tmp_path / "run", CPU), lambda *_: None, 120.0, False)
    watch.close()
    assert watch._limit(watch._sign) == 720  # the start
    watch.sign("the check before the first step", ends=True)
    assert watch._limit(watch._sign) == 120
    watch.sign("step", 0)
    assert watch._limit(watch._sign) == 720  # the first step compiles
    for seconds, limit in ((300.0, 720), (1.0, 720), (1.0, 120), (10.0, 120), (10.0, 200), (10.0, 200)):
        now += seconds
        watch.sign("step")
        assert watch._limit(watch._sign) == limit
    now += 1000
    watch.sign("a save", 6)
    assert watch._limit(watch._sign) == 720
    watch.sign("step", 6)
    assert watch._limit(watch._sign) == 200 and watch._sign == Sign(now, 6, "step", False)
    assert not watch._thread.is_alive()


# --- logs and times ---------------------------------------------------------------------------------------------------


def test_a_rank_s_log_keeps_errors_and_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "logs/rank_00003.log"
    with pytest.raises(ZeroDivisionError), RankLog(tmp_path, CPU) as log:
        log.write("first")
        raise ZeroDivisionError("by nothing")
    with RankLog(tmp_path, CPU):
        pass
    text = path.read_text()
    assert re.search(r"\n\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ first\n.*Z end: Traceback .*\n", text)
    assert "ZeroDivisionError: by nothing\n" in text and text.endswith("Z end\n")
    assert not Path(f"{path}.old").exists()
    monkeypatch.setattr(rank_log, "MOST_BYTES", len(text) - 1)
    with RankLog(tmp_path, CPU):
        pass
    assert Path(f"{path}.old").read_text() == text and len(path.read_text()) < len(text)


def test_what_a_step_s_time_goes_into(monkeypatch):
    """Two measured steps by a clock of our own: 2 s of data, 1 of computing, two exchanges of 0.5 and 0.25 s."""
    now = 0.0
    monkeypatch.setattr("moe_dit.times.time.perf_counter", lambda: now)
    times = StepTimes(CPU)

    def step(scale: float) -> None:
        nonlocal now
        times.begin(0)
        marks = [(2.5, "begins"), (0.5, "exchange"), (0.5, "exchanged"), (1.0, "exchange"), (0.25, "exchanged")]
        for seconds, mark in [*marks, (0.25, "forward"), (3.0, "")]:
            now += scale * seconds
            if mark:
                times(mark)
        times.end(scale * 2.0)
        times("exchange")  # a look between steps
        now += 100.0

    assert times.take() is None
    step(7.0)
    assert times.take() is None  # the first step is no measure
    step(1.0)
    step(3.0)
    seconds, data, compute, exchange, memory = times.take()
    assert (seconds, data, compute, exchange) == (16.0, 4.0, 2.0, 1.5)
    assert memory == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.2)
    assert times.take() is None
    times.begin(3)
    now += 4.0
    times("forward")  # without an exchange
    times.end(1.0)
    assert times.take()[:4] == [4.0, 1.0, 3.0, 0.0]


def rows(*own: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor([[seconds, data, compute, 0.1, 1.0] for seconds, data, compute in own])


def test_stragglers(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_dit.times.ranks.hosts", lambda: ["n1", "n1", "n1", "n2"])
    of = RankTimes(tmp_path)
    even = [(0.5, 0.0, 0.1)] * 3
    slow = rows(*even, (0.5, 0.25, 0.0625))
    line = "rank 3 (n2) takes 0.31 s to its first collective of each step, others 0.1: 0.25 s of them waiting for data"
    assert [of.stragglers(step, slow) for step in (50, 100, 150)] == [[], [f"step 100: {line}"], []]
    assert of.stragglers(200, rows(*even, (0.5, 0.0, 0.1))) == []
    assert [of.stragglers(step, slow) for step in (250, 300)] == [[], [f"step 300: {line}"]]
    # More by half, but little of a step; much of a step, but not more by half.
    of = RankTimes(tmp_path)
    for row in ((0.5, 0.0, 0.149), (0.5, 0.0, 0.151)):
        lines = [of.stragglers(step, rows(*even, row)) for step in (50, 100)]
        assert len(lines[1]) == (row[2] > 0.15)
    of = RankTimes(tmp_path)
    assert [of.stragglers(step, rows(*[(2.0, 0.0, 0.1)] * 3, (2.0, 0.0, 0.29))) for step in (50, 100)] == [[], []]
    # Of two ranks each is held against the other.
    monkeypatch.setattr("moe_dit.times.ranks.hosts", lambda: ["n1", "n2"])
    of = RankTimes(tmp_path)
    both = [of.stragglers(step, rows((0.5, 0.0, 0.1), (0.5, 0.0, 0.2))) for step in (50, 100)]
    (line,) = both[1]
    assert line.startswith("step 100: rank 1 (n2) takes 0.2 s to its first collective of each step, others 0.1: 0 s ")
    monkeypatch.setattr("moe_dit.times.ranks.hosts", lambda: ["n1"])
    assert RankTimes(tmp_path).stragglers(50, rows((0.5, 0.4, 0.1))) == []


def test_a_bad_patience_is_one_line(latents, tmp_path):
    command = [sys.executable, "jobs/train.py", "--ds", "ds_configs/zero1_ep1.json", "--recipe", "digits"]
    command += ["--data", str(latents), "--out", str(tmp_path / "run")]
    env = ENV | {"MOE_DIT_PATIENCE_SECONDS": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr == "error: MOE_DIT_PATIENCE_SECONDS is '0'; it should be a number of seconds\n"
