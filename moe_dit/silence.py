"""Ends a rank where others are gone without a word (a cable, a switch, a whole node), so that who is left can go on.

No packet says goodbye then, and collectives would wait for 30 minutes. A rank that stands still lets the others know,
now and then, that it is there, through the store that the ranks met in, and looks who else did: what its main thread
waits for does not matter. So a rank that is slow, waits for data or stands in a debugger of Python is not silent; one
whose process is stopped, whose node is gone, or that the network does not reach is. Who has heard nothing of another
rank, or nothing of the store, for :data:`SILENCE_SECONDS` says so in one line and ends.

The thread that decides this speaks with no network, disk or terminal itself: each of them may be what is silent. While
steps are done, nobody says or asks anything.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence

from moe_dit.runtime import ranks
from moe_dit.runtime.joining import BEATS, named, seconds_from
from moe_dit.runtime.stopping import GRACE_SECONDS, end_lost_torchrun
from moe_dit.runtime.within import within

SILENCE = "MOE_DIT_SILENCE_SECONDS"  # environment variable: how long others may be silent before a rank ends
SILENCE_SECONDS = 180.0
# Of it: when a rank begins to speak, how often it does, when others are taken for gone, and what the end may take.
BEGIN, EACH, GONE, ENDING = 1 / 6, 1 / 24, 0.8, 1 / 8
FIRST_SECONDS = 2.0  # that the rank which speaks has before the others end: a launcher ends all when the first one goes


def silence() -> float:
    """Seconds within which a rank ends that hears nothing of others; InputError where the environment has no number."""
    return seconds_from(SILENCE, SILENCE_SECONDS)


class Silence:
    """Watches for ranks that are gone until :meth:`close`.

    Args:
        tell: called from a thread, on the rank that speaks for those it can hear, with a line, before it ends.
        seconds: from when others are gone to this rank's end, at most (:func:`silence`).

    Attributes:
        last: gives what this rank does, in words for a line; since when (monotonic seconds); and whether that is a
            step, in which no rank is far from the others.
    """

    def __init__(self, tell: Callable[[str], None], seconds: float):
        began = time.monotonic()
        self.last: Callable[[], tuple[str, float, bool]] = lambda: ("in the start", began, False)
        self._tell = tell
        self._seconds = seconds
        self._rank = ranks.world().rank
        self._hosts = ranks.hosts()
        self._meeting = ranks.meeting()
        self._values = [0] * len(self._hosts)  # what each rank has last said
        self._heard = [0.0] * len(self._hosts)  # when that was new
        self._reached = 0.0  # when the store last answered
        self._refused = 0.0  # when its host last said that nobody keeps it
        self._closed = threading.Event()
        if self._meeting is not None:
            threading.Thread(target=self._watch, name="silence", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        awake = looked = time.monotonic()
        while not self._closed.wait(self._seconds * EACH):
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
            if gone := self._gone(now, max(since, awake)):
                self._end(gone, max(since, awake))

    def _speak(self) -> None:
        """Say that this rank is there, and look who else is."""
        began = time.monotonic()
        try:
            store = self._meeting.connect(self._seconds * EACH)  # type: ignore[union-attr]
            store.set(BEATS.format(self._rank), str(time.monotonic_ns()))
            values = store.multi_get([BEATS.format(rank) for rank in range(len(self._hosts))])
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

    def _gone(self, now: float, since: float) -> Sequence[int]:
        """Ranks of which nothing was heard for too long, since when something is waited for; rank 0 for the store."""
        limit = self._seconds * GONE
        without_store = now - max(self._reached, since)
        if without_store > limit / 4:
            # Where the host answers, its launcher was killed, and all have so long to save.
            limit = max(limit, GRACE_SECONDS) if self._refused > self._reached else limit
            return [0] if without_store > limit else []
        return [rank for rank, heard in enumerate(self._heard) if now - max(heard, since) > limit]

    def _end(self, gone: Sequence[int], since: float) -> None:
        """Say who is gone, if it is this rank that has to, and end."""
        lost = time.monotonic() - max(self._reached, since) > self._seconds * GONE / 4
        what, *_ = self.last()
        first = min(set(range(len(self._hosts))) - set(gone))
        speaks = self._rank == first if not lost else self._rank == 1 or ranks.world().local_rank == 0
        who = f"{named(gone, self._hosts)} {'have' if len(gone) > 1 else 'has'}"
        if lost:
            who = f"the store that ranks met in ({os.environ['MASTER_ADDR']}, of {named(gone, self._hosts)}) has"
        line = f"{who} been silent for {time.monotonic() - since:.0f} s, {what}: the node or the network is gone, and "
        line += "the ranks that are left end, for their launcher or job to go on without it"
        if not self._closed.is_set():
            end((lambda: self._tell(line)) if speaks else None, self._seconds * ENDING)


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
