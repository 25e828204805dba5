"""The listen queues: waiting for clients, and which of the workers the kernel wakes for one.

1. Of the workers that have nothing to do, the kernel wakes one for each client (EPOLLEXCLUSIVE),
   always the one that has been in its list longest: if it woke all, most would find no client.
2. A worker that runs calls, or has threads of a module's, is woken besides, and never in place of
   an idle one: a module may keep the interpreter lock, and the client would wait for that.
3. A worker that was woken and cannot accept wakes the others, as the master does when one has died;
   and every worker checks the queues once a second, in case the one that was woken does not run.
"""

import select
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from cpanbridge.supervisor.gate import Gate
from cpanbridge.workers.client import syscalls

_EXCLUSIVE = select.EPOLLIN | select.EPOLLEXCLUSIVE  # see EPOLL_CTL_ADD in epoll_ctl(2)
_WAKE_OTHERS_EVERY = 1.0


class Ready(NamedTuple):
    """What a wait has ended for."""

    listener: bool  # a client has connected
    internal: bool  # a client that is here already needs a thread, or the acceptor was woken


class ListenQueue:
    """The listeners' queues, as one worker sees them.

    Called by the leading thread, but for what says otherwise. `internal` is readable when that
    thread has something else to do.
    """

    def __init__(self, listeners: Sequence[socket.socket], internal: int, gate: Gate) -> None:
        self._listeners = list(listeners)  # in the order in which they are tried
        self._internal = internal
        self._gate = gate
        self._exclusive = self._watch(_EXCLUSIVE)
        self._always = self._watch(select.EPOLLIN)
        self._others_woken = -_WAKE_OTHERS_EVERY

    def _watch(self, events: int) -> select.epoll:
        epoll = select.epoll()
        for listener in self._listeners:
            epoll.register(listener, events)
        epoll.register(self._internal, select.EPOLLIN)
        return epoll

    def wait(self, *, exclusive: bool) -> Ready:
        """Wait for a client, or until `internal` is readable.

        With `exclusive` the kernel may wake another worker for a client instead of this one.
        """
        told = {fd for fd, _ in (self._exclusive if exclusive else self._always).poll()}
        return Ready(bool(told - {self._internal}), self._internal in told)

    def accept(self) -> int | None:
        """A waiting client's descriptor; None when none waits. Raises OSError."""
        for turn, listener in enumerate(self._listeners):
            try:
                client = syscalls.accept(listener.fileno())
            except (BlockingIOError, ConnectionAbortedError):
                continue
            if len(self._listeners) > 1:  # the next one is tried first at the next call
                self._listeners.append(self._listeners.pop(turn))
            return client
        return None

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
        for listener in tuple(self._listeners):
            poll.register(listener, select.POLLIN)
        return bool(poll.poll(0))
