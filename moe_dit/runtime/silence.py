"""Ends a rank where others are gone without a word (a cable, a switch, a whole node), so that who is left can go on.

No packet says goodbye then, and collectives would wait for half an hour, or for days where ranks wait for the slowest.
A rank that stands still lets the others know, now and then, that it is there, through the store that the ranks met in,
and looks who else did: what its main thread waits for does not matter. So a rank that is slow, waits for data or stands
in a debugger of Python is not silent; one whose process is stopped, whose node is gone, or that the network does not
reach is. Who has heard nothing of another rank, or of the store, for SILENCE_SECONDS says so in one line and ends.

The thread that decides this speaks with no network, disk or terminal itself: each of them may be what is silent. While
training does its steps, nobody says or asks anything.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from moe_dit.runtime.joining import BEATS, Meeting, named, seconds_from
from moe_dit.runtime.progress import console
from moe_dit.runtime.stopping import GRACE_SECONDS, end_lost_torchrun
from moe_dit.runtime.within import within
from moe_dit.runtime.world import world

SILENCE = "MOE_DIT_SILENCE_SECONDS"  # environment variable: from when others are gone to a rank's end, at most
SILENCE_SECONDS = 180.0
# Of it: when a rank begins to speak, how often it does, when others are taken for gone, and what the end may take.
BEGIN, EACH, GONE, ENDING = 1 / 6, 1 / 24, 0.8, 1 / 8
FIRST_SECONDS = 2.0  # that the rank which speaks has before the others end: a launcher ends all when the first one goes
LEFT = 2**62  # what a rank says last


def silence_seconds() -> float:
    """Seconds of silence that are too many; InputError where the environment has no number."""
    return seconds_from(SILENCE, SILENCE_SECONDS)


class Silence:
    """Watches, from a thread, for ranks that are gone, until :meth:`close`.

    Args:
        meeting: of the ranks.
        seconds: from when others are gone to this rank's end, at most (:func:`silence_seconds`).

    Attributes:
        tell: called from a thread with a line, on the rank that speaks for those it can hear, before it ends.
        last: gives what this rank does, in words for the line; since when (monotonic seconds); and whether that is a
            training step, in which no rank is far from the others.
    """

    def __init__(self, meeting: Meeting, seconds: float):
        began = time.monotonic()
        self.tell: Callable[[str], None] = lambda line: console.print(line, markup=False, soft_wrap=True)
        self.last: Callable[[], tuple[str, float, bool]] = lambda: ("", began, False)
        self._seconds = seconds
        self._rank = world().rank
        self._meeting = meeting
        self._values = [0] * len(meeting.hosts)  # what each rank has last said
        self._heard = [0.0] * len(meeting.hosts)  # when that was new
        self._reached = 0.0  # when the store last answered
        self._refused = 0.0  # when its host last said that nobody keeps it
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="silence", daemon=True).start()

    def close(self) -> None:
        """Watch no more, and let the others know that this rank leaves, whose work may take longer."""
        if not self._closed.is_set():
            self._closed.set()
            within(1.0, self._leave)

    def _leave(self) -> None:
        with suppress(RuntimeError, OSError):  # its host may have left before
            self._say(self._meeting.connect(1.0), LEFT)

    def _say(self, store: object, value: int) -> None:
        store.set(BEATS.format(self._rank), str(value))  # type: ignore[attr-defined]

    def _watch(self) -> None:
        awake = looked = time.monotonic()
        while not self._closed.wait(self._seconds * EACH * max(1.0, len(self._values) / 512)):  # one store answers all
            now = time.monotonic()
            if now - looked > self._seconds / 4:
                awake = now  # this process stood still itself (a suspended job), and could hear nobody
            looked = now
            _, since, in_step = self.last()
            if in_step and now - since < self._seconds * BEGIN:
                continue
            # What was sent before a link broke may be answered minutes after it is whole again, or never. So each
            # attempt has a connection and a thread of its own.
            threading.Thread(target=self._speak, name="silence", daemon=True).start()
            self._look(now, max(since, awake))

    def _speak(self) -> None:
        """Say that this rank is there, and look who else is."""
        began = time.monotonic()
        try:
            store = self._meeting.connect(self._seconds * EACH)
            if not self._closed.is_set():
                self._say(store, time.monotonic_ns())
            if self._closed.is_set():  # perhaps since
                self._say(store, LEFT)
            values = store.multi_get([BEATS.format(rank) for rank in range(len(self._values))])
        except ConnectionRefusedError:
            self._refused = began
            return
        except (RuntimeError, OSError):  # torch's errors of stores are RuntimeErrors
            return
        for rank, value in enumerate(map(int, values)):
            if value > self._values[rank]:
                self._values[rank] = value
                self._heard[rank] = max(self._heard[rank], began)
        self._reached = max(self._reached, began)

    def _look(self, now: float, since: float) -> None:
        """End where nothing was heard for too long; ``since``: when this rank began to wait."""
        limit = self._seconds * GONE
        without_store = now - max(self._reached, since)
        if without_store > limit / 4:
            # Where the host answers, its launcher was killed, and all have so long to save.
            if without_store > (max(limit, GRACE_SECONDS) if self._refused > self._reached else limit):
                place = f"{os.environ['MASTER_ADDR']}, of {named([0], self._meeting.hosts)}"
                # Who could hear others is not known: one of each node speaks.
                speaks = self._rank == 1 or world().local_rank == 0
                self._end(f"the store that ranks met in ({place}) has", without_store, speaks)
            return
        silent = {rank: now - max(heard, since) for rank, heard in enumerate(self._heard) if self._values[rank] < LEFT}
        gone = [rank for rank, seconds in silent.items() if seconds > limit]
        if gone:
            first = next(rank for rank in range(len(self._heard)) if rank not in gone)
            who = f"{named(gone, self._meeting.hosts)} {'have' if len(gone) > 1 else 'has'}"
            self._end(who, max(silent[rank] for rank in gone), self._rank == first)

    def _end(self, who: str, seconds: float, speaks: bool) -> None:
        what, *_ = self.last()
        line = f"{who} been silent for {seconds:.0f} s{what and ', '}{what}: the node or the network is gone, and the "
        line += "ranks that are left end, for their launcher or job to go on without it"
        if not self._closed.is_set():
            end((lambda: self.tell(line)) if speaks else None, self._seconds * ENDING)


def end(tell: Callable[[], None] | None, seconds: float) -> None:
    """End this process within some seconds, whatever blocks: after a call, or after the rank that speaks had time to.

    The torchrun above it ends too where it could not start ranks anew.
    """
    if tell is None:
        time.sleep(min(FIRST_SECONDS, seconds / 2))
    else:
        within(seconds / 2, tell)
    within(seconds / 2, lambda: end_lost_torchrun(seconds / 4))
    os._exit(1)
