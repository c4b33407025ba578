"""Moments of the work of a device, and the seconds between them."""

import time
from collections.abc import Callable
from typing import Any

import torch


def moment(device: torch.device, now: Callable[[], float] | None = None) -> Any:
    """This moment of a device's work: on a GPU an event in its queue, which the host does not wait for.

    Args:
        device: that works.
        now: the clock elsewhere, in seconds; None for time.perf_counter.
    """
    if device.type != "cuda":
        return (now or time.perf_counter)()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one moment to another of the same device; a GPU's must have come."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
