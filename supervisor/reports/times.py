"""Times in the reports: ages, Unix seconds, and ISO 8601.

What happened is kept as a CLOCK_MONOTONIC time, so setting the machine's clock changes no age.
"""

import time
from datetime import datetime


def iso_time(at: float) -> str:
    """Unix seconds as local time in ISO 8601, with its offset from UTC."""
    return datetime.fromtimestamp(at).astimezone().isoformat()


def age(since: int) -> float:
    """Seconds since a CLOCK_MONOTONIC time in nanoseconds."""
    return max(0.0, (time.monotonic_ns() - since) / 1e9)


def wall_time(at: int) -> float:
    """A CLOCK_MONOTONIC time in nanoseconds as Unix seconds, by the wall clock as it is now."""
    return time.time() - age(at)
