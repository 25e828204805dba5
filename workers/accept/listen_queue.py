"""Who waits outside, and which of the workers hear of them.

A client that nobody has accepted waits at the doors of all workers. Of the workers that have
nothing to do, the kernel wakes one for each client (EPOLLEXCLUSIVE), the one that has stood there
longest: if it woke all, most would find nobody, and a lone client would cost more the more workers
there are. A worker that runs calls, or has threads of a module's, is woken as well, and never in
place of another: they may keep the interpreter lock, and the client would wait for that.

Who is told of clients whom another worker would have let in at once stays away for a moment
(`deference.py`). Who is woken and cannot let the client in has the others look
(`Gate.leave_to_others`), and so has the master for who has died. Where nobody can, because who was
woken does not get to run, the others find the client within a second (`is_overlooked`).
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Sequence

from cpanbridge.supervisor.gate import Gate
from cpanbridge.workers.accept.deference import Deference
from cpanbridge.workers.client import syscalls

A_WHILE_SECONDS = 1.0
_IN_TURN = select.EPOLLIN | select.EPOLLEXCLUSIVE  # see EPOLL_CTL_ADD in epoll_ctl(2)


class ListenQueue:
    """The listeners' queues, as one worker sees them.

    Called by the thread at the door, but for what says otherwise. `interrupts` is readable when
    that thread has to look at something else.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        interrupts: select.epoll,
        gate: Gate,
        deference: Deference,
    ) -> None:
        self._listeners = tuple(listeners)
        self._next = list(listeners)  # in the order in which they are looked at
        self._interrupts = interrupts
        self._gate = gate
        self._deference = deference
        self._told_in_turn = self._watch(_IN_TURN)
        self._told_always = self._watch(select.EPOLLIN)
        self._queueing = threading.Lock()
        self.told = False  # of somebody there, and has not tried to let them in yet
        self.relies_on_others = False  # has found nobody there, or is about to
        self._left_to_others = -A_WHILE_SECONDS

    def _watch(self, events: int) -> select.epoll:
        epoll = select.epoll()
        for listener in self._listeners:
            epoll.register(listener, events)
        epoll.register(self._interrupts, select.EPOLLIN)
        return epoll

    def wait(self, *, always: bool) -> list[tuple[int, int]]:
        """Wait until somebody comes, or the interrupts are readable; what tells so, as of epoll.

        Where not `always`, another worker may be woken for a client in place of this one. Returns
        nothing where this one was, and the client is left to another one all the same.
        """
        ready = (self._told_always if always else self._told_in_turn).poll()
        if always or any(fd == self._interrupts.fileno() for fd, _ in ready):
            return ready
        seconds = self._deference.seconds_away()
        if not seconds:
            return ready
        interrupted = self._interrupts.poll(seconds)
        return ready + interrupted if interrupted else []

    def accept(self) -> int | None:
        """A waiting client's descriptor; None when nobody waits. Raises OSError."""
        self.told, self.relies_on_others = False, True
        self._deference.will_not_look_again()
        for turn, listener in enumerate(self._next):
            try:
                client = syscalls.accept(listener.fileno())
            except (BlockingIOError, ConnectionAbortedError):
                continue
            if len(self._next) > 1:  # the next look begins at another one
                self._next.append(self._next.pop(turn))
            self.relies_on_others = False
            self._deference.has_accepted()
            return client
        return None

    def leave_to_others(self) -> None:
        """This worker can let nobody in for now; ask the others, but not all the time."""
        now = time.monotonic()
        if now - self._left_to_others >= A_WHILE_SECONDS and self._somebody_waits():
            self._left_to_others = now
            self._gate.leave_to_others()

    def leave(self) -> None:
        """Nobody looks any more for now: have others look, where only this worker was told.

        Called in whichever thread sees it.
        """
        self._deference.will_not_look_again()
        if self.told:
            self.told = False
            self._gate.leave_to_others()

    def is_overlooked(self) -> bool:
        """Whether somebody waits, and this worker goes by others' having been told. In any thread.

        Asked now and then, and when another worker wants it.
        """
        return self.relies_on_others and self._somebody_waits()

    def queue_up_again(self) -> bool:
        """Be the last of those that are woken in turn; False when this one is not woken any more.

        Then it is to look, and is told always from there on. Called in any thread.
        """
        with self._queueing, contextlib.suppress(OSError, ValueError):  # it is closed
            for listener in self._listeners:
                if self._told_in_turn is self._told_always:
                    return True
                self._told_in_turn.unregister(listener)
                try:
                    self._told_in_turn.register(listener, _IN_TURN)
                except OSError:
                    self._told_in_turn = self._told_always  # no memory: better too often than never
                    return False
        return True

    def _somebody_waits(self) -> bool:
        queues = select.poll()
        for listener in self._listeners:
            queues.register(listener, select.POLLIN)
        return bool(queues.poll(0))
