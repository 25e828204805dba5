"""A seat: a slot of the shared memory, and what the master knows of the worker in it.

A seat is free, or belongs to a generation. Its worker boots, serves, and at some time leaves: it is
told to by an order in its slot and a TERM, and killed when it does not go. Which workers there
should be is not decided here but in `workforce.py`.

The master forks the worker itself, or has a template do it: then the worker says its pid at first,
and begins when the master knows it. Called in the master, but where it says otherwise.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from cpanbridge.supervisor.config import KILL_MARGIN
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.layout import COMMAND_NONE
from cpanbridge.supervisor.processes.context import BEGIN, Report, WorkerContext, read_report
from cpanbridge.supervisor.processes.generation import (
    BOOT_SECONDS,
    DUMP_SECONDS,
    Generation,
    Spawner,
)
from cpanbridge.supervisor.system.event_loop import Timer
from cpanbridge.supervisor.system.log_text import describe_exit

LOGGER = logging.getLogger("cpanbridge.master")

_BIRTH_SECONDS = 10.0  # a template forks a worker in some milliseconds


class WorkerProcess:
    """One slot and its worker."""

    def __init__(self, spawner: Spawner, number: int) -> None:
        self._spawner = spawner
        self._slot = spawner.shared.slots[number]
        self.number = number
        self.generation: Generation | None = None  # None: free
        self.pid = 0  # 0: no worker
        self.ready_at: float | None = None  # CLOCK_MONOTONIC; None: it boots
        self.failures = 0  # starts in a row that did not get it ready
        self.refill: Timer | None = None  # its next start
        self.exiting = ""  # why its worker was told to leave, or will be
        self.hurry = True  # it has graceful_timeout for that, not drain_timeout
        self.told = False
        self.refill_after = False  # when it has left, the same seat gets its replacement
        self.replaces: WorkerProcess | None = None  # told to leave once the worker here is ready
        self._report = -1  # read end of the worker's report pipe; -1: it has reported
        self._timer: Timer | None = None  # the end of what it may take to boot, or to leave
        self._overdue = False
        self._handle = -1  # a pidfd, where the worker is not this process's child

    @property
    def ready(self) -> bool:
        """Whether its worker has booted."""
        return self.ready_at is not None

    @property
    def retirement_request(self) -> int:
        """Why the worker asks to be retired: PLEA_..."""
        return int(self._slot.retirement_request)

    def exits_within(self, seconds: float) -> bool:
        """Whether the worker was given a time to leave that is over by then."""
        exit_by = int(self._slot.exit_by)
        return 0 < exit_by <= time.monotonic_ns() + int(seconds * 1e9)

    @property
    def accepts(self) -> bool:
        """Whether its worker may still accept a client."""
        return self.ready and not self._slot.shut

    @property
    def unborn(self) -> bool:
        """Whether a template has been told to fork a worker, which has not said its pid yet."""
        return self.pid == 0 and self._report >= 0

    def fork(
        self, generation: Generation, on_report: "Callable[[WorkerProcess, Report], None]"
    ) -> None:
        """Put a worker here. Raises OSError when there cannot be one."""
        read_end, write_end = os.pipe()
        # Before there is a worker that could take room in this slot, the others look at it.
        self._spawner.shared.use_slot(self.number)

        def main(context: WorkerContext) -> None:
            os.close(read_end)
            self._spawner.mains.worker(context._replace(slot=self.number, report=write_end))

        try:
            pid = self._spawner.fork(f"Worker {self.number}", generation, main)
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)
        self._report = read_end
        self._occupy(generation, pid, on_report)

    def have_forked(
        self,
        generation: Generation,
        command: Callable[[int, int], None],
        on_birth: "Callable[[WorkerProcess, int], None]",
    ) -> None:
        """Have a template put a worker here: `order` tells it the slot and the report's descriptor.

        `on_birth` is called with the worker's pid, or with 0 when there will be none. Raises
        OSError when the template cannot be told.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._spawner.shared.use_slot(self.number)
        try:
            command(self.number, theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self.generation, self.ready_at, self._report = generation, None, ours.detach()
        self._spawner.loop.watch(self._report, lambda: self._read_birth(on_birth))
        self._set_timer(_BIRTH_SECONDS, lambda: on_birth(self, 0))

    def _read_birth(self, on_birth: "Callable[[WorkerProcess, int], None]") -> None:
        try:
            on_birth(self, int(os.read(self._report, 64) or b"0"))
        except BlockingIOError:
            return

    def let_begin(self, pid: int, on_report: "Callable[[WorkerProcess, Report], None]") -> None:
        """The worker that a template has forked is this process: let it boot."""
        assert self.generation is not None
        self._occupy(self.generation, pid, on_report)
        with contextlib.suppress(OSError):  # it is gone already, as SIGCHLD tells
            os.write(self._report, BEGIN)

    def _occupy(
        self, generation: Generation, pid: int, on_report: "Callable[[WorkerProcess, Report], None]"
    ) -> None:
        self.generation, self.pid, self.ready_at = generation, pid, None
        self._slot.since = time.monotonic_ns()
        self._slot.admitted_before = self._slot.admitted
        self._slot.pid, self._slot.generation = pid, generation.number
        self._spawner.loop.watch(self._report, lambda: self._read_report(on_report))
        self._set_timer(BOOT_SECONDS, self._boot_hangs)

    def inherit(self, on_end: "Callable[[WorkerProcess], None]") -> bool:
        """Take over the worker that another master has put in this slot; False if there is none.

        It is not a child of this process: its end is seen by a pidfd. All its descriptors are
        closed by then, as with one that was waited for.
        """
        self.pid = self._slot.pid
        try:
            self._handle = os.pidfd_open(self.pid) if self.pid else -1
        except ProcessLookupError:
            self.vacate()
        if self._handle < 0:
            return False
        self.ready_at = time.monotonic()
        self._spawner.loop.watch(self._handle, lambda: on_end(self))
        if self._slot.command != COMMAND_NONE:
            self.told, self.exiting = True, "told by the master before this one"
            if self._slot.exit_by:
                left = (self._slot.exit_by - time.monotonic_ns()) / 1e9
                self._set_timer(left + KILL_MARGIN, self._does_not_end)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal, if there is one."""
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
        elif self.pid:
            os.kill(self.pid, number)  # it is there until this process waits for it

    def _read_report(self, on_report: "Callable[[WorkerProcess, Report], None]") -> None:
        report = self.take_report()
        if report is not None:
            on_report(self, report)

    def take_report(self) -> Report | None:
        """What the worker says of its boot, once; None when it died without a word."""
        if self._report < 0:
            return None
        try:
            data = os.read(self._report, 65536)
        except (BlockingIOError, ConnectionResetError):
            data = b""  # the worker is gone; it may have left a child that holds the pipe
        self._close_report()
        if not data:
            return None  # SIGCHLD says how it ended
        report = read_report(data)
        self._cancel_timer()
        if report.error is None:
            self.ready_at = time.monotonic()
        return report

    def _close_report(self) -> None:
        self._spawner.loop.forget(self._report)
        os.close(self._report)
        self._report = -1

    def _boot_hangs(self) -> None:
        self._overdue = True
        self.signal(signal.SIGUSR2)  # it writes where it is to the log, see workers/boot.py
        self._set_timer(DUMP_SECONDS, self.kill)

    def describe_end(self, status: int) -> str:
        """How the worker ended, in words."""
        if self._overdue:
            return f"not ready after {BOOT_SECONDS:g} s; the log shows what it was at"
        return describe_exit(status)

    def tell_to_exit(self, command: int, seconds: float | None) -> None:
        """Have the worker finish what it runs and leave, in so many seconds, or None: in its time.

        `order` is one of `ORDER_RETIRE` and `ORDER_STOP`. One that cannot end by itself is killed.
        """
        self.told = True
        self._slot.command = command
        self._slot.exit_by = time.monotonic_ns() + int(seconds * 1e9) if seconds is not None else 0
        self._cancel_timer()
        if seconds is not None:
            self._set_timer(seconds + KILL_MARGIN, self._does_not_end)
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the worker at once, if there is one. What it ran is lost."""
        self.signal(signal.SIGKILL)

    def _does_not_end(self) -> None:
        LOGGER.warning("Worker %d (pid %d) does not end: killed", self.number, self.pid)
        self.kill()

    def vacate(self) -> None:
        """The worker has ended: give back what it held."""
        self._spawner.shared.clear(self._slot)
        handoff_sockets.throw_away(self._spawner.wakeups[self.number].take)
        self.pid, self.ready_at, self.told, self.exiting = 0, None, False, ""
        self._overdue = False
        self._cancel_timer()
        if self._handle >= 0:
            self._spawner.loop.forget(self._handle)
            os.close(self._handle)
            self._handle = -1

    def free(self) -> None:
        """Nobody is to sit here any more, until a generation takes the seat."""
        self.cancel_start()
        self.generation, self.replaces = None, None
        self.failures, self.refill_after = 0, False

    def cancel_start(self) -> None:
        """Start nobody here. A worker that has not begun ends when it hears nothing more."""
        if self.unborn:
            self._close_report()
            self._cancel_timer()
        if self.refill is not None:
            self.refill.cancel()
            self.refill = None

    def _set_timer(self, seconds: float, action: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._spawner.loop.after(seconds, action)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
