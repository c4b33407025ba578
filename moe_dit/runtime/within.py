"""Calls that may block for ever, and must not hold up who makes them."""

import threading
import time
from collections.abc import Callable
from typing import Any


def within(seconds: float, *calls: Callable[[], Any]) -> None:
    """Make calls at once, each in a thread of its own, and wait for all, but no longer than ``seconds``.

    A disk or a terminal that does not answer holds its call for as long as it likes; an error ends a call alone.
    """
    threads = [threading.Thread(target=call, name="within", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
