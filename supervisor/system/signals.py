"""Signals as events of the loop: no signal handler does anything, so none interrupts a step.

On a terminal two of them mean something else. The second ^C is for a user who will not wait. And a
SIGHUP says that the terminal was closed, when the process had a controlling terminal and has none
any more: /dev/tty stands for it until then (tty(4)).

The interpreter writes each signal's number to a socket (signal.set_wakeup_fd), which the loop
watches. Called in the master.
"""

import os
import signal
import socket
from collections.abc import Callable
from functools import partial

from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.exhaustion import is_exhausted

_COMMANDS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU),
)


class Signals:
    """The master's signals. `handle` is called with the number of each, in the loop.

    The second SIGINT is a SIGQUIT, and the SIGHUP of a terminal that was closed is a SIGTERM.
    """

    def __init__(self, loop: Loop, handle: Callable[[int], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._received, self._wakeup = socket.socketpair()
        # One that nohup(1) has started is to stay: it ignores SIGHUP until it is caught.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._ends_with_terminal = _has_terminal() and not ignored
        self._interrupted = False

    def catch(self) -> None:
        """Begin: from now on these signals have no default action."""
        for end in (self._received, self._wakeup):
            end.setblocking(False)
        self._loop.watch(self._received.fileno(), self._receive)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (*_COMMANDS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def ignore(self) -> None:
        """Ignore them while the master ends: Python would restore the default actions."""
        for number in _COMMANDS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self) -> None:
        numbers = dict.fromkeys(self._received.recv(4096))
        numbers[signal.SIGCHLD] = None  # with a full buffer its number may not have been written
        for number in numbers:
            self._loop.attempt(partial(self._handle, self._meaning(number)))

    def _meaning(self, number: int) -> int:
        if number == signal.SIGINT:
            before, self._interrupted = self._interrupted, True
            return signal.SIGQUIT if before else number
        closed = number == signal.SIGHUP and self._ends_with_terminal and not _has_terminal()
        return signal.SIGTERM if closed else number


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return is_exhausted(error)  # that says nothing of the terminal
    return True
