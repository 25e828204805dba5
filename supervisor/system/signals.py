"""Signals as events of the loop: nothing is done in a handler, so none interrupts anything.

The interpreter writes each signal's number to a wake-up descriptor (signal.set_wakeup_fd), and the
loop reads it when it comes round. Called in the master.
"""

import signal
import socket
from collections.abc import Callable

from cpanbridge.supervisor.system.event_loop import Loop

_CAUGHT = ("TERM", "INT", "QUIT", "HUP", "CHLD", "USR1", "USR2", "TTIN", "TTOU")


class Signals:
    """The master's signals. `handle` is called with the number of each, in the loop."""

    def __init__(self, loop: Loop, handle: Callable[[int], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._heard, self._wakeup = socket.socketpair()

    def catch(self) -> None:
        """From now on they end nothing by themselves."""
        for end in (self._heard, self._wakeup):
            end.setblocking(False)
        self._loop.watch(self._heard.fileno(), self._receive)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for name in _CAUGHT:
            signal.signal(signal.Signals[f"SIG{name}"], lambda *_: None)

    def ignore(self) -> None:
        """The master ends: Python would put the defaults back while it does."""
        for name in _CAUGHT:
            if name != "CHLD":
                signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)

    def _receive(self) -> None:
        numbers = dict.fromkeys(self._heard.recv(4096))
        numbers[signal.SIGCHLD] = None  # of many at once, some may not have been written
        for number in numbers:
            self._handle(number)
