"""The descriptors by which processes wake each other's threads.

A wake-up is only a hint to look again: one that is lost because its process was killed costs a
tenth of a second (`gate.LOST_WAKEUP_SECONDS`). Called from every process and thread.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.layout import Shared


class Wakeups(NamedTuple):
    """The descriptors by which others reach one worker. Made by the master, before it forks."""

    room: int  # an eventfd: the leading thread, when there may be room for what waits
    main: int  # an eventfd: the main thread, when there is something for it to do
    put: int  # its hand-off queue, for clients that others hand over: see handoff_sockets.py
    take: int  # the end from which it takes them

    @classmethod
    def create(cls) -> "Wakeups":
        """Raises OSError when the process is out of descriptors."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        room, main = (os.eventfd(0, flags) for _ in range(2))
        return cls(room, main, *handoff_sockets.create())


def wake(eventfd: int) -> None:
    """Wake the thread that waits for this eventfd."""
    # Written 2**64 - 2 times and not read yet: it is readable.
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(eventfd, 1)


def wake_all_that_wait(shared: Shared, wakeups: Sequence[Wakeups]) -> None:
    """Have every worker look for room. Called in the master, when there is more of it."""
    for slot, each in zip(shared.used_slots, wakeups, strict=False):
        if slot.waiting:
            wake(each.room)


def wake_acceptors(shared: Shared, wakeups: Sequence[Wakeups]) -> None:
    """Have every worker accept that waits for a connection's room."""
    for slot, each in zip(shared.used_slots, wakeups, strict=False):
        if slot.accept_waits_for:
            wake(each.room)


def wake_main_threads(shared: Shared, wakeups: Sequence[Wakeups]) -> None:
    """Have the main thread of every worker check whether there is something to do."""
    for each in wakeups[: shared.header.slots_used]:
        wake(each.main)
