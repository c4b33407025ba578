"""Where a rank stands, in words, and how long is too long."""

import json
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from helpers import refused
from helpers.small import flags_of
from moe_dit.events import events
from moe_dit.runtime import silence
from moe_dit.runtime.joining import Meeting
from moe_dit.runtime.rank_log import RankLog
from moe_dit.status import read_status, write_status
from moe_dit.train import _Told
from moe_dit.watchdog import Sign, Watchdog, standing, unfinished

CPU = torch.device("cpu")


def test_what_ends_a_job_is_in_its_status(tmp_path, capsys):
    told = _Told(tmp_path, "a")
    told.stands_still("no step for 120 s", 0, True)
    assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["message"] == "no step for 120 s"
    told.stands_still("no step for 121 s", 7, False)
    assert [(event["what"], event["step"]) for event in events(tmp_path)] == [("failed", 0), ("hang", 7)]
    assert capsys.readouterr().err == "no step for 120 s\nno step for 121 s\n"


def test_a_rank_of_a_start_that_lost_its_run_says_nothing_there(tmp_path, capsys):
    """Cut off, it may outlive a start that took over; beside a rank 0 of its own that is silent it speaks."""
    told = _Told(tmp_path, "a")
    told.speaks = False
    write_status(tmp_path, "training", "b")
    told.stands_still("no step for 120 s", 3, False)
    assert list(events(tmp_path)) == [] and capsys.readouterr().err == "no step for 120 s\n"
    write_status(tmp_path, "training", "a")
    told.stands_still("no step for 121 s", 3, False)
    assert [(event["message"], event["start"]) for event in events(tmp_path)] == [("no step for 121 s", "a")]


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


def test_a_bad_patience_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MOE_DIT_PATIENCE_SECONDS", "0")
    line = refused(capfd, "jobs/train.py", *flags_of(tmp_path / "run"))
    assert line == "error: MOE_DIT_PATIENCE_SECONDS is '0'; it should be a number of seconds\n"
    assert not (tmp_path / "run").exists()


class Ended(Exception):
    """A rank has ended."""


STOPPED = {"this rank is stopped for 20 s": 20.0, "this rank is stopped for an hour": 3600.0}


# Seconds of the others' silence after which a rank ends, of 180 that it may take in all.
@pytest.mark.parametrize(
    ("name", "ends", "who"),
    [
        ("nobody is gone", None, None),
        ("steps are done", None, None),
        ("rank 2 is gone", (144, 158), "rank 2 (c)"),
        ("the store is gone", (144, 158), "the store that ranks met in (10.9.0.1, of rank 0 (a))"),
        ("rank 2 has left, and said so", None, None),
        ("rank 2 is gone for 120 s", None, None),
        ("the store is gone for 120 s", None, None),
        ("this rank is stopped for 20 s", None, None),
        # All were suspended, and this rank goes on before the others do.
        ("this rank is stopped for an hour", None, None),
        # Its launcher was killed: ranks have 300 s to save.
        ("nobody keeps the store", (300, 315), "the store that ranks met in (10.9.0.1, of rank 0 (a))"),
    ],
)
def test_who_is_silent(monkeypatch, name, ends, who):
    now, said = 1000.0, []
    monkeypatch.setattr(silence, "world", lambda: SimpleNamespace(rank=1, local_rank=0))
    gone = silence.Silence(Meeting(None, ["a", "b", "c"], ""), 180.0)
    gone.tell = said.append
    monkeypatch.setattr(silence.time, "monotonic", lambda: now)
    monkeypatch.setattr(silence.threading, "Thread", lambda target, **_: SimpleNamespace(start=target))
    monkeypatch.setenv("MASTER_ADDR", "10.9.0.1")
    gone.last = lambda: ("at step 8", now if name == "steps are done" else 1000.0, True)
    spoken = 0

    def wait(seconds):
        nonlocal now
        now += seconds + (STOPPED.get(name, 0) if 1100 < now < 1108 else 0)
        return now > 6000

    def speak():
        nonlocal spoken
        spoken += 1
        away = now < 1120 if name.endswith("for 120 s") else True
        if name == "nobody keeps the store":
            gone._refused = now
        elif not (name.startswith("the store is gone") and away):
            gone._reached = now
            if name == "rank 2 has left, and said so":
                gone._values[2] = silence.LEFT
            for rank in range(2 if name.startswith("rank 2") and away else 3):
                # Suspended ranks go on a minute after this one.
                if not (name.endswith("an hour") and 4700 < now < 4760 and rank != 1):
                    gone._heard[rank] = now

    def end(tell, seconds):
        assert seconds == 22.5
        if tell is not None:
            tell()
        raise Ended

    gone._closed = SimpleNamespace(wait=wait, is_set=lambda: False)
    gone._speak = speak
    monkeypatch.setattr(silence, "end", end)
    if ends is None:
        gone._watch()
        assert said == [] and bool(spoken) == (name != "steps are done")
    else:
        with pytest.raises(Ended):
            gone._watch()
        assert ends[0] < now - 1000 < ends[1]
        # Rank 0 speaks where it is there and heard.
        if name == "rank 2 is gone":
            assert said == []
        else:
            assert re.fullmatch(
                re.escape(who) + r" has been silent for \d+ s, at step 8: the node or the network .*", said[0]
            )
