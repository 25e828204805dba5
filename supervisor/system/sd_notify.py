"""Notifying the service manager of the daemon's state: the protocol of systemd's sd_notify(3).

`NOTIFY_SOCKET` names a datagram socket, and a message is some lines of NAME=VALUE. Without the
variable nothing is sent. Nothing here waits: a manager that does not read its socket misses a
message, and that is logged once.

A service has one main process, and the manager accepts messages of no other (NotifyAccess=main). So
in an upgrade one master sends at a time: the old one until it has named the new one, and the new
one after the old one has ended. Called in the master.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence

from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")

# A worker, and what its modules start, must not have these: it would notify as the daemon.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class ServiceManager:
    """Sends the messages of one master; with `silent`, none before `speak` is called."""

    def __init__(
        self, loop: Loop, environ: Mapping[str, str] = os.environ, *, silent: bool = False
    ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        self._loop = loop
        self._silent = silent
        self._state: Sequence[str] = ()  # the last state, sent or not
        self._complained = False
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._pause = int(environ.get("WATCHDOG_USEC", "0")) / 1e6 / 2 if mine else 0.0

    def watch_dog(self) -> None:
        """Send a keep-alive now, and twice in each watchdog interval. Called once."""
        if self._pause:
            self._send("WATCHDOG=1")
            self._loop.after(self._pause, self.watch_dog)

    def speak(self) -> None:
        """This master is the main process from now on: send its state, and all that follows."""
        self._silent = False
        if self._state:
            self._send(*self._state)

    def ready(self, status: str) -> None:
        """The daemon serves: after the start, and after each reload or upgrade, failed or not."""
        self._say("READY=1", status)

    def reloading(self) -> None:
        """A reload has begun; `ready` follows."""
        now = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
        self._say("RELOADING=1", "Reloading: a new generation boots", now)

    def stopping(self, seconds: float) -> None:
        """The daemon stops, which may take so many seconds."""
        extend = f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"
        self._say("STOPPING=1", "Stopping: running requests finish", extend)

    def status(self, status: str) -> None:
        """A status text; the state stays as it is."""
        self._send(f"STATUS={status}")

    def handed_over(self, pid: int) -> None:
        """Another process is the main one from now on; this one sends nothing more."""
        self._send(f"MAINPID={pid}", "STATUS=Upgraded")
        self._silent = True

    def _say(self, state: str, status: str, *more: str) -> None:
        self._state = (state, *more, f"STATUS={status}")
        self._send(*self._state)

    def _send(self, *lines: str) -> None:
        if self._socket is None or self._silent:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            if not self._complained:
                self._complained = True
                reason = explain(error)
                LOGGER.warning("The service manager cannot be notified (NOTIFY_SOCKET): %s", reason)
