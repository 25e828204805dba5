"""The log process of a master, and the pair of sockets by which output reaches it.

It is there as long as the log is, or is about to be, in the JSON format: see raw_output.py. The
master keeps both ends, so nothing that was written is lost while another log process takes the
place of one that has died, or that was told to end because the log is in another file now. A new
master, after an upgrade, has a pair and a log process of its own; the old ones stay until the last
worker of the old master has ended. Called in the master, but where it says otherwise.
"""

import contextlib
import logging
import os
import signal
import socket
from typing import NoReturn

import setproctitle

from cpanbridge.supervisor.system import logs, raw_output
from cpanbridge.supervisor.system.event_loop import Loop, Timer
from cpanbridge.supervisor.system.waiting import readable
from cpanbridge.supervisor.wording import explain_start

LOGGER = logging.getLogger("cpanbridge.master")

TITLE = "cpanbridged: log"
# Seconds.
_PAUSE = 0.5  # before another one is started in place of one that has died
_PAUSE_AFTER_ERROR = 1.0
_LAST_SECONDS = 1.0  # for the last lines, when the daemon ends
_FOR_THE_MASTER = (
    *(signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
    *(signal.SIGTTIN, signal.SIGTTOU),
)


class LogProcess:
    """One master's. It is there after `follow` or `open`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._ends: tuple[socket.socket, socket.socket] | None = None  # its, and the writers'
        self._handle = -1  # a pidfd of it; -1: there is none
        self._replaced = False  # it was told to end, because another one follows
        self._start_timer = Timer(lambda: None)

    def open(self) -> None:
        """From now on all output is captured, in processes that log in JSON. Raises OSError."""
        if self._ends is None:
            self._ends = raw_output.pair()
            logs.capture(self._ends[1].fileno())
            self._start()

    def follow(self) -> None:
        """The log was set up anew."""
        if logs.writes_json() and self._ends is None:
            self.open()
        elif logs.writes_json():
            self.restart()
        else:
            self._give_up_ends()
            self._forget()

    def restart(self) -> None:
        """Have another one take its place, if there is one: the log is in another file now."""
        if self._handle >= 0:
            self._replaced = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGTERM)

    def close(self, *, wait: bool) -> None:
        """The master ends; `wait` until the last lines are written, where nobody else writes.

        Called when the loop turns no more.
        """
        self._give_up_ends()
        if self._handle >= 0 and wait:
            readable([self._handle], _LAST_SECONDS)

    def let_go(self) -> None:
        """Called in a forked child, whose log is set up."""
        if self._ends is not None:
            logs.keep_captured()
            for end in self._ends:
                end.close()

    def _start(self) -> None:
        """Fork it. What is written before waits in the socket."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become()
            self._watch(pid)
        except OSError as error:
            LOGGER.error("The log process cannot be started: %s", explain_start(error))
            self._start_timer = self._loop.after(_PAUSE_AFTER_ERROR, self._start)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _watch(self, pid: int) -> None:
        try:
            self._handle = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)  # a child that was not waited for; there must not be two
            raise
        self._loop.watch(self._handle, self._ended)

    def _forget(self) -> None:
        if self._handle >= 0:
            self._loop.forget(self._handle)
            os.close(self._handle)
            self._handle = -1

    def _ended(self) -> None:
        self._forget()
        pause, self._replaced = 0.0 if self._replaced else _PAUSE, False
        if self._ends is not None:
            self._start_timer = self._loop.after(pause, self._start)

    def _become(self) -> NoReturn:
        """Called in the child."""
        try:
            assert self._ends is not None
            setproctitle.setproctitle(TITLE)
            for number in _FOR_THE_MASTER:
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            source, writer = self._ends[0], logs.writer()
            raw_output.keep_only(source.fileno(), writer.fileno())
            raw_output.copy(source, writer.write)
        except BaseException:
            LOGGER.exception("The log process ends by a fault of the daemon's own")
        finally:
            os._exit(0)

    def _give_up_ends(self) -> None:
        """Nothing more is captured. It ends when all others have given up theirs."""
        self._start_timer.cancel()
        if self._ends is not None:
            logs.capture(-1)
            for end in self._ends:
                end.close()
            self._ends = None
