"""The hand-off queues of slots that have no worker: the master empties them.

A worker may put a client in after the owner of its state has ended, which it has not seen yet. It
sees that soon, and has its client back; but the copy of the client's socket would stay in the
queue, and if that worker ended as well, the client would wait for ever. So while a slot has no
worker, whatever comes into its queue is discarded.

Nobody else takes out of a queue that is not its own: it might be another worker's by then, and the
client whose message is gone would be left to nobody. Called in the master.
"""

import select
from collections.abc import Sequence

from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.system.event_loop import Loop


class UnattendedQueues:
    """Those of one master's slots."""

    def __init__(self, loop: Loop, shared: Shared, wakeups: Sequence[Wakeups]) -> None:
        self._slots = shared.slots
        self._queues = [each.take for each in wakeups]
        self._watched: set[int] = set()  # slots
        # Its own, and not the loop's: a process that is forked closes what the loop watches.
        self._epoll = select.epoll()
        loop.watch(self._epoll.fileno(), self._empty)
        for number, slot in enumerate(self._slots):
            if not slot.pid:
                self.leave(number)

    def leave(self, slot: int) -> None:
        """The slot has no worker, or none any more."""
        handoff_sockets.discard_all(self._queues[slot])
        if slot not in self._watched:
            self._epoll.register(self._queues[slot], select.EPOLLIN)
            self._watched.add(slot)

    def attend(self, slot: int) -> None:
        """A worker is in the slot, and has taken nothing out yet."""
        if slot in self._watched:
            self._epoll.unregister(self._queues[slot])
            self._watched.remove(slot)

    def _empty(self) -> None:
        readable = {descriptor for descriptor, _ in self._epoll.poll(0)}
        for slot in list(self._watched):
            if self._queues[slot] not in readable:
                continue
            if self._slots[slot].pid:
                self.attend(slot)  # in an upgrade: the new master has started a worker there
            else:
                handoff_sockets.discard_all(self._queues[slot])
