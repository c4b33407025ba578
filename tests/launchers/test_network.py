"""Two hosts and the cable between them, under torchrun: whatever vanishes, who is left trains again, and loses nothing.

A host that is gone is one that no packet comes from any more; nobody closes a connection. docs/runs.md has a table of
what these tests print.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from helpers import ROOT, TIMEOUT, losses, once, small, told, wait_for
from helpers.hosts import Hosts, cannot, two_hosts
from helpers.small import RUN_TRAINING, flags_of

SILENCE = 20.0  # seconds, in place of 180
STEPS = 60

pytestmark = pytest.mark.skipif(bool(why := cannot()), reason=why)

# A step takes a tenth of a second, so that it is known where a run stands.
SCRIPT = f"""
import os, sys, time
os.chdir({str(ROOT)!r})
from moe_dit.data.reader import ShardReader
read = ShardReader.read
ShardReader.read = lambda *given: time.sleep(0.1) or read(*given)
{RUN_TRAINING}
"""


class Pair:
    """A run that two hosts train, each with a rank."""

    def __init__(self, hosts: Hosts, folder: Path, store: int = 0):
        self.hosts = hosts
        self.run = folder / "run"
        self.logs = [folder / "host0.log", folder / "host1.log"]
        self.script = folder / "train.py"
        self.script.write_text(SCRIPT)
        self.agents = [self.start(host, store) for host in (0, 1)]
        wait_for(lambda: self.steps() >= 10, "ten steps", self.logs[0])

    def start(self, host: int, store: int) -> subprocess.Popen:
        flags = [*flags_of(self.run), f"--steps={STEPS}", "--set=checkpoint.every=3"]
        env = {"MOE_DIT_SILENCE_SECONDS": f"{SILENCE:g}", "PYTHONPATH": str(ROOT)}
        return self.hosts.torchrun(host, [str(self.script), *flags], self.logs[host], store, **env)

    def steps(self) -> int:
        try:
            return len((self.run / "metrics.jsonl").read_text().splitlines())
        except OSError:
            return 0

    def lines(self, host: int) -> list[str]:
        """What was said on a host of others that are gone."""
        return re.findall(r"^.* been silent for .*$", self.logs[host].read_text(), re.MULTILINE)


def cut(pair: Pair) -> None:
    pair.hosts.link(1, "down")


def cut_for_some_seconds(pair: Pair) -> None:
    cut(pair)
    time.sleep(SILENCE / 3)
    pair.hosts.link(1, "up")


def come_and_go(pair: Pair) -> None:
    def again_and_again() -> None:
        with suppress(subprocess.CalledProcessError):  # the test is over
            for _ in range(5):
                for state in ("down", "up"):
                    pair.hosts.link(1, state)
                    time.sleep(3)

    Thread(target=again_and_again, daemon=True).start()


def lose_one_direction(pair: Pair) -> None:
    pair.hosts.deaf(1)


def lose_the_store(pair: Pair) -> None:
    cut(pair)
    pair.hosts.kill(0)


def cut_while_the_disk_is_silent(pair: Pair) -> None:
    """Whoever opens these files waits, as for a file server that does not answer, until they are there again."""
    files = [pair.run / name for name in ("events.jsonl", "status.json", "logs/rank_00000.log")]
    for file in files:
        file.rename(file.with_name(f"{file.name}.real"))
        os.mkfifo(file)
    cut(pair)

    def answer() -> None:
        wait_for(lambda: pair.lines(0) and not pair.hosts.processes(1), "the ranks' ends", pair.logs[0])
        for file in files:
            file.with_name(f"{file.name}.real").replace(file)

    Thread(target=answer, daemon=True).start()


def undisturbed(shared: Path) -> list[float]:
    def make(folder: Path) -> None:
        small.train(folder / "run", f"--steps={STEPS}", "--set=checkpoint.every=100")

    return losses(once(shared, "sixty_steps", make) / "run")


def seconds_until_it_trains(pair: Pair, break_it: Callable[[Pair], None]) -> float:
    """Break something; gives the seconds from then until there is a step that was not done yet."""
    began = time.monotonic()
    break_it(pair)
    time.sleep(1.5)  # records are written within a second of their step
    before = max(pair.steps(), 10)
    if break_it is lose_the_store:
        # What is left is a job that queues itself again.
        assert pair.agents[1].wait(TIMEOUT) != 0
        pair.agents[1] = pair.start(1, store=1)
    wait_for(lambda: pair.steps() > before, "another step", None)
    return time.monotonic() - began


# What breaks, one after the other; the host of the rendezvous; the hosts that say so; the run's events.
GOES_ON = ["started", "done"]
AGAIN = ["started", "failed", "hang", "started", "done"]
CASES = {
    "silent disk": ([cut_for_some_seconds, cut_while_the_disk_is_silent], 0, [0, 1], ["started", "started", "done"]),
    "store": ([lose_the_store], 0, [1], ["started", "failed", "started", "done"]),
    "cut": ([cut], 0, [0, 1], AGAIN),
    "cut from the rendezvous": ([cut], 1, [0, 1], AGAIN),
    "one direction": ([lose_one_direction], 0, [0, 1], AGAIN),
    "comes and goes": ([come_and_go], 0, [], GOES_ON),
}
SHORT = "silent disk"
GONE = (
    r"rank 1 \(host1\) has been silent for \d+ s, at step \d+: the node or the network is gone",
    r"the store that ranks met in \(10\.9\.0\.1, of rank 0 \(host0\)\) has been silent for \d+ s, at step \d+: the ",
)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == SHORT else pytest.mark.long) for c in CASES])
def test_what_vanishes_without_a_word(shared, tmp_path, case):
    breaks, store, speakers, happened = CASES[case]
    left = 1 if case == "store" else store
    with two_hosts(case.replace(" ", "-")) as hosts:
        pair = Pair(hosts, tmp_path, store)
        for break_it in breaks:
            seconds = seconds_until_it_trains(pair, break_it)
            print(f"{break_it.__name__}, rendezvous on host {store}: trains again after {seconds:.0f} s")
        assert pair.agents[left].wait(TIMEOUT) == 0, pair.logs[left].read_text()[-5000:]
        wait_for(lambda: not hosts.processes(1 - left), "the end of the other host's processes", pair.logs[1 - left])
    assert [host for host in (0, 1) for _ in pair.lines(host)] == speakers
    assert all(re.match(GONE[host], pair.lines(host)[0]) for host in speakers), [pair.lines(host) for host in speakers]
    kinds = told(pair.run)
    assert sorted(kinds) == sorted(happened) and kinds[-2:] == happened[-2:], kinds
    assert json.loads((pair.run / "status.json").read_text())["state"] == "done"
    assert losses(pair.run) == pytest.approx(undisturbed(shared), rel=1e-6)
