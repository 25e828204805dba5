"""Waiting for a few descriptors at once, whatever their numbers are.

select(2) takes none above 1023, and all that a daemon of many workers opens may be above.
"""

import select
from collections.abc import Sequence


def readable(descriptors: Sequence[int], seconds: float | None) -> list[int]:
    """Those that can be read, or are at their end, within so many seconds; None: no limit."""
    poll = select.poll()
    for each in descriptors:
        poll.register(each, select.POLLIN)
    milliseconds = None if seconds is None else max(0.0, seconds * 1000)  # below zero: no limit
    return [descriptor for descriptor, _ in poll.poll(milliseconds)]
