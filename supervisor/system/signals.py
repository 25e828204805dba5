"""Signals as events of the loop: no signal handler does anything, so none interrupts a step.

The interpreter writes each signal's number to a socket (signal.set_wakeup_fd), which the loop
watches. Called in the master.
"""

import signal
import socket
from collections.abc import Callable

from cpanbridge.supervisor.system.event_loop import Loop

_COMMANDS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU),
)


class Signals:
    """The master's signals. `handle` is called with the number of each, in the loop."""

    def __init__(self, loop: Loop, handle: Callable[[int], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._received, self._wakeup = socket.socketpair()

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
            self._handle(number)
