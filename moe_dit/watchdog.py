"""Says who waits where when a run stands still, long before a collective gives up after 30 minutes.

A thread of each rank looks at its rank's last sign of life. Where that is too old, it works out where the rank's main
thread stands and tells the others, through a connection of its own to the store that the ranks met in: a main thread
that waits in a collective does not matter. Rank 0 says in one line what all told, and who did not answer. Each rank's
log gets its stacks. It tells, and ends nothing but the check before the first step; and while all is well it speaks
with nobody. Where a rank does not answer at all, moe_dit/runtime/silence.py ends the others.
"""

import json
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch

from moe_dit.runtime import ranks
from moe_dit.runtime.joining import named, seconds_from
from moe_dit.runtime.rank_log import RankLog
from moe_dit.runtime.silence import end
from moe_dit.runtime.within import within

PATIENCE = "MOE_DIT_PATIENCE_SECONDS"  # environment variable: how long without a step is too long
PATIENCE_SECONDS = 120.0
MEDIANS = 20  # or so many times the median step, where that is more
LONGEST = 6  # times the patience at most, and for what is no step: building, compiling, looking, saving
WINDOW_SECONDS = 2.0  # that rank 0 collects at least; else a quarter of the patience
ENDING_SECONDS = 10.0  # that the end of a check which takes too long may take, whatever blocks

COLLECTIVES = {
    *("all_reduce", "all_to_all", "all_to_all_single", "all_gather", "all_gather_into_tensor", "all_gather_object"),
    *("all_gather_coalesced", "all_reduce_coalesced", "reduce_scatter", "reduce_scatter_tensor", "reduce", "gather"),
    *("gather_object", "scatter", "scatter_object_list", "broadcast", "broadcast_object_list", "barrier"),
    *("monitored_barrier", "send", "recv", "batch_isend_irecv", "allgather_fn", "reduce_scatter_fn", "new_group"),
}
_OURS = ("moe_dit.", "eval.", "data_prep.")
_PLURALS = {"waits": "wait", "is": "are"}


class Sign(NamedTuple):
    """A sign of life: when (monotonic seconds), after how many steps, and what has begun."""

    time: float
    step: int
    what: str
    ends: bool  # the job, where nothing follows


def patience() -> float:
    """Seconds without a step that are too many; InputError where the environment has no number."""
    return seconds_from(PATIENCE, PATIENCE_SECONDS)


class Watchdog:
    """Watches this rank's main thread until :meth:`close`.

    Args:
        log: this rank's.
        tell: called from a thread, on the rank that speaks for all, with a line, the steps that were done, and
            whether the job ends with it.
        patience: seconds (:func:`patience`).
        on_gpu: whether this rank computes on one.
    """

    def __init__(self, log: RankLog, tell: Callable[[str, int, bool], None], patience: float, on_gpu: bool):
        self.patience = patience
        self._window = max(WINDOW_SECONDS, patience / 4)
        self._log = log
        self._tell = tell
        self._on_gpu = on_gpu
        self._rank = ranks.world().rank
        self._hosts = ranks.hosts()
        self._meeting = ranks.meeting()
        self._main = threading.main_thread().ident
        self._store: Any = None  # while something is wrong
        self._seconds: deque[float] = deque(maxlen=50)
        self._sign = Sign(time.monotonic(), 0, "the start", False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def sign(self, what: str, step: int = 0, ends: bool = False) -> None:
        """A sign of life from the main thread; costs next to nothing.

        Args:
            what: has begun: "step" for the next one, or words such as "a save".
            step: steps that are done.
            ends: the job, if it takes too long, after saying so.
        """
        now = time.monotonic()
        if what == self._sign.what == "step":
            self._seconds.append(now - self._sign.time)
        self._sign = Sign(now, step, what, ends)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._thread.join(self._window)

    def last(self) -> tuple[str, float, bool]:
        """The last sign of life, as :class:`moe_dit.runtime.silence.Silence` asks for it."""
        sign = self._sign
        return _when(sign), sign.time, sign.what == "step"

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        stuck: Sign | None = None
        noticed = told = False
        while not self._closed.wait(min(10.0, self.patience / 8)):
            sign = self._sign
            if stuck is not None and sign is not stuck:
                self._recover(stuck, noticed, told)
                stuck = None
            idle = time.monotonic() - sign.time
            if idle <= self.patience:
                continue
            if stuck is None:
                stuck, noticed, told = sign, False, False
                self._connect()
            # Before it is time to speak: ranks' limits differ a little, and who speaks should find all others' states.
            state = self._state()
            self._post(state)
            if idle > self._limit(sign) and not noticed:
                noticed = True
                line = f"no sign for {idle:.0f} s, after step {sign.step}: {state}"
                within(self._window, partial(self._log.stacks, line))  # perhaps it is the disk that does not answer
                told = self._speak(sign, state)
                if sign.ends and self._sign is sign and not self._closed.is_set():
                    end(None, ENDING_SECONDS)

    def _limit(self, sign: Sign) -> float:
        """Seconds after which what has begun takes too long."""
        longest = LONGEST * self.patience
        if sign.ends:
            return self.patience
        if sign.what != "step" or not self._seconds:  # a first step compiles
            return longest
        return min(longest, max(self.patience, MEDIANS * statistics.median(self._seconds)))

    def _recover(self, stuck: Sign, noticed: bool, told: bool) -> None:
        """The main thread goes on."""
        self._post("")
        if noticed:
            line = f"moving again after {self._sign.time - stuck.time:.0f} s"
            self._log.write(line)
            if told:
                self._post("", "told")
                self._tell(line, self._sign.step, False)
        self._store = None

    def _connect(self) -> None:
        """Connect to the ranks' store; not where there is one rank, or nobody keeps the store any more."""
        if self._meeting is not None:
            meeting = self._meeting
            self._store = _quietly(lambda: meeting.connect(self._window))

    def _post(self, state: str, key: str = "") -> None:
        """Let others know where this rank stands, or that it has spoken; a store that does not take it is given up."""
        if self._store is not None:
            kept = _quietly(lambda: self._store.set(f"hang/{key or self._rank}", state) or True)
            self._store = self._store if kept else None

    def _speak(self, sign: Sign, state: str) -> bool:
        """Say where all stand, if it is this rank that has to; whether it was."""
        states = {self._rank: state}
        lost = self._meeting is not None and self._store is None
        if not lost:
            states = self._collect(sign, self._store, states)
            # Rank 0 speaks. Where it cannot, the lowest that can does, if nobody has when it had its time.
            if self._rank and not self._others_silent(sign, self._store, states):
                return False
        elif self._rank != 1 and ranks.world().local_rank != 0:
            return False  # of each node one says that there is no store
        if self._sign is not sign:
            return False
        self._tell(self._line(sign, states, lost), sign.step, sign.ends)
        self._post("yes", "told")
        return True

    def _collect(self, sign: Sign, store: Any, states: dict[int, str]) -> dict[int, str]:
        """Where the ranks stand that say so in time."""
        deadline = time.monotonic() + self._window
        while len(states) < len(self._hosts) and time.monotonic() < deadline and self._sign is sign:
            for rank in range(len(self._hosts)):
                found = _quietly(partial(_peek, store, f"hang/{rank}"))
                if rank not in states and found:
                    states = states | {rank: found}
            if self._closed.wait(0.1):
                break
        return states

    def _others_silent(self, sign: Sign, store: Any, states: dict[int, str]) -> bool:
        """Whether it falls to this rank to speak: none below it answers, and nobody has spoken."""
        deadline = time.monotonic() + 2 * self._window
        while time.monotonic() < deadline and self._sign is sign:
            if _quietly(lambda: _peek(store, "hang/told")):
                return False
            if self._closed.wait(0.2):
                return False
        return min(states) == self._rank

    def _line(self, sign: Sign, states: dict[int, str], lost: bool) -> str:
        """All ranks' states in one line."""
        seconds = time.monotonic() - sign.time
        by_state: dict[str, list[int]] = {}
        for rank in sorted(states):
            by_state.setdefault(states[rank], []).append(rank)
        parts = []
        for state, those in sorted(by_state.items(), key=lambda item: (not item[0].startswith("waits in"), item[1])):
            verb, rest = state.split(" ", 1)
            parts.append(f"{named(those, self._hosts)} {verb if len(those) == 1 else _PLURALS[verb]} {rest}")
        silent = [rank for rank in range(len(self._hosts)) if rank not in states]
        if lost:
            parts.append(f"rank 0 ({self._hosts[0]}), which keeps what ranks tell each other, does not answer")
        elif silent:
            parts.append(f"{named(silent, self._hosts)} do{'es' if len(silent) == 1 else ''} not answer")
        return f"no step for {seconds:.0f} s, {_when(sign)}: {'; '.join(parts)}"

    def _state(self) -> str:
        """Where this rank's main thread stands, in words."""
        frames = sys._current_frames()
        state = standing(frames.get(self._main or 0))
        if not state.startswith("waits in") and "engine" in state:
            # Autograd computes on GPUs in threads of its own, which Python knows no names of.
            known = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
            inner = [standing(frame) for ident, frame in frames.items() if ident not in known]
            state = next((found for found in inner if found.startswith("waits in")), state)
        on_gpu = unfinished() if self._on_gpu else ""
        return state + (f", its GPU in {on_gpu}" if on_gpu else "")


def _when(sign: Sign) -> str:
    return f"at step {sign.step + 1}" if sign.what == "step" else f"in {sign.what}"


def standing(frame: FrameType | None) -> str:
    """Where a thread stands, from its innermost frame: which collective, or which function of ours."""
    collective = ours = ""
    data = left = False
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith(("torch.distributed", "deepspeed.comm")):
            # The outermost of those that call each other: a broadcast may be part of broadcast_object_list.
            collective = function if function in COLLECTIVES and not left else collective
        elif collective:
            left = True
        if module.startswith(_OURS) and not ours:
            ours = f"{module.rpartition('.')[2]}.{function}"
        data = data or (module, function) == ("moe_dit.train", "__next__")  # of Waits
        frame = frame.f_back
    if collective:
        return f"waits in {collective} ({ours})"
    return f"waits for data in {ours}" if data else f"is in {ours or 'Python'}"


def unfinished() -> str:
    """The oldest collective that this rank's GPU has not finished, by torch's flight recorder; "" where it is silent.

    torch 2.14 has it as _dump_nccl_trace_json; it looks at events, and neither waits for a GPU nor gives it work.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return ""
    entries = json.loads(_quietly(lambda: dump(includeCollectives=True, onlyActive=True)) or "{}").get("entries", [])
    waiting = [entry for entry in entries if entry.get("state") != "completed"]
    if not waiting:
        return ""
    oldest = min(waiting, key=lambda entry: entry.get("record_id", 0))
    return f"{oldest.get('profiling_name', 'a collective')} number {oldest.get('collective_seq_id', '?')}"


def _peek(store: Any, key: str) -> str:
    """What stands under a key; "" where there is none."""
    return store.get(key).decode() if store.check([key]) else ""


def _quietly(call: Callable[[], Any]) -> Any:
    """What a call gives, or None: a store may go away with its rank, and nothing here may end a run."""
    try:
        return call()
    except (RuntimeError, OSError):  # torch's errors of stores are RuntimeErrors
        return None
