"""The listen queues: waiting for clients, and which of the workers the kernel wakes for one.

1. Of the workers that have nothing to do, the kernel wakes one for each client (EPOLLEXCLUSIVE): if
   it woke all, most would find no client. It is the one longest in the socket's wait queue.
2. A worker that runs calls, or has threads of a module's, is woken besides, and never in place of
   an idle one: a module may keep the interpreter lock, and the client would wait for that.
3. A worker that is woken again and again for clients that the worker which accepted last, and is
   still awake, would find by itself, stays away for `AWAY_SECONDS` each time.

A lone client that calls without a pause is back before the worker that has answered it waits again,
so the kernel wakes another one for each call, and the two race. That costs half of its calls.

A worker that was woken and cannot accept wakes the others, as the master does when one has died;
and every worker checks the queues once a second, in case the one that was woken does not run.
"""

import errno
import os
import select
import time

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.accept.listeners import Listeners
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.spare_descriptors import spare

_EXCLUSIVE = select.EPOLLIN | select.EPOLLEXCLUSIVE  # see EPOLL_CTL_ADD in epoll_ctl(2)
_WAKE_OTHERS_EVERY = 1.0
AWAY_SECONDS = 0.004
TIMES_IN_A_ROW = 40  # fewer, and of two clients one would be left to the other one's worker


class ListenQueue:
    """The listeners' queues, as one worker sees them.

    Called by the leading thread, but for what says otherwise. `internal` is readable when that
    thread has something else to do.
    """

    def __init__(
        self,
        listeners: Listeners,
        internal: select.epoll,
        shared: Shared,
        slot: int,
        gate: Gate,
    ) -> None:
        self._source = listeners
        self._known = listeners.sockets  # when it was looked at last
        self._listeners = list(self._known)  # in the order in which they are tried
        self._internal = internal
        self._header = shared.header
        self._slots = shared.slots
        self._me = 1 + slot
        self._gate = gate
        self._exclusive = self._watch(_EXCLUSIVE)
        self._always = self._watch(select.EPOLLIN)
        self.woken = False  # for a client, and has not tried to accept it yet
        self._times_not_needed = 0  # in a row
        self._left_to = (0, 0)  # the worker that a client was left to, and what it had accepted
        self._others_woken = -_WAKE_OTHERS_EVERY

    def _watch(self, events: int) -> select.epoll:
        epoll = select.epoll()
        for listener in self._listeners:
            epoll.register(listener, events)
        epoll.register(self._internal, select.EPOLLIN)
        return epoll

    def _follow(self) -> None:
        """Accept from the sockets that there are now."""
        before, self._known = self._known, self._source.sockets
        for each in set(self._known).difference(before):
            self._exclusive.register(each, _EXCLUSIVE)
            self._always.register(each, select.EPOLLIN)
        for each in set(before).difference(self._known):
            self._exclusive.unregister(each)
            self._always.unregister(each)
            each.close()
        self._listeners = list(self._known)

    def wait(self, seconds: float | None, *, exclusive: bool) -> bool:
        """Wait for a client, for `internal`, or so many seconds; whether to accept first.

        With `exclusive` the kernel may wake another worker for a client instead of this one.
        """
        events = (self._exclusive if exclusive else self._always).poll(seconds)
        internal = any(descriptor == self._internal.fileno() for descriptor, _ in events)
        self.woken = self.woken or len(events) > internal
        if exclusive and events and not internal and self._is_not_needed():
            self._internal.poll(AWAY_SECONDS)
            return False
        return self.woken

    def _is_not_needed(self) -> bool:
        """Whether to leave the client to the worker that accepted last, which is awake.

        Not if that one runs a call, or exits; and it is left no second client, whatever keeps it,
        before it has accepted the first.
        """
        awake = self._header.awake_acceptor
        if not awake or awake == self._me:
            return False
        other = self._slots[awake - 1]
        if other.running or not other.is_staying:
            self._times_not_needed = 0
            return False
        self._times_not_needed += 1
        left_to = awake, other.accepted
        if self._times_not_needed <= TIMES_IN_A_ROW or left_to == self._left_to:
            return False
        self._left_to = left_to
        return True

    def accept(self) -> int | None:
        """A waiting client's descriptor; None when none waits. Raises OSError."""
        if self._known is not self._source.sockets:
            self._follow()
        self.will_not_accept()
        self.woken = False
        if not spare.restore():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        for turn, listener in enumerate(self._listeners):
            try:
                client = syscalls.accept(listener.fileno())
            except (BlockingIOError, ConnectionAbortedError):
                continue
            if len(self._listeners) > 1:  # the next one is tried first at the next call
                self._listeners.append(self._listeners.pop(turn))
            self._header.awake_acceptor = self._me
            return client
        return None

    def will_not_accept(self) -> None:
        """This worker does not accept again before it waits.

        Called also in the thread that begins to serve, when no thread is left to lead.
        """
        if self._header.awake_acceptor == self._me:
            self._header.awake_acceptor = 0

    def leave_to_others(self) -> None:
        """This worker cannot accept for now: wake the others, but not all the time.

        May be called in any thread.
        """
        now = time.monotonic()
        if now - self._others_woken >= _WAKE_OTHERS_EVERY and self.has_clients():
            self._others_woken = now
            self._gate.wake_other_workers()

    def has_clients(self) -> bool:
        """Whether any client waits. May be called in any thread."""
        poll = select.poll()
        for listener in self._source.sockets:
            if (descriptor := listener.fileno()) >= 0:  # else the leading thread has closed it
                poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
