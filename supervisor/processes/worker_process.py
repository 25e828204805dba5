"""A worker process in a slot: what the master knows of it, and how it starts and ends.

A slot of the shared memory is free, or belongs to a generation. Its worker process boots, serves,
and at some time exits: because of a command in its slot and a SIGTERM, and by SIGKILL where it does
not exit in time. Which workers there should be is decided in `pool.py`.

The master forks the worker itself, or has a template do it. A worker that a template has forked
sends its pid at first, and boots only when the master knows it. Called in the master, but where it
says otherwise.
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
from cpanbridge.supervisor.memory.fields import COMMAND_NONE
from cpanbridge.supervisor.processes.context import BEGIN, Report, WorkerContext, read_report
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.spawner import BOOT_SECONDS, DUMP_SECONDS, Spawner
from cpanbridge.supervisor.system.event_loop import Timer
from cpanbridge.supervisor.system.log_text import describe_exit

LOGGER = logging.getLogger("cpanbridge.master")

_FORK_SECONDS = 10.0  # for a template to fork a worker, which takes it some milliseconds


class WorkerProcess:
    """One slot and its worker process."""

    def __init__(self, spawner: Spawner, number: int) -> None:
        self._spawner = spawner
        self._slot = spawner.shared.slots[number]
        self.number = number
        self.generation: Generation | None = None  # None: the slot is free
        self.pid = 0  # 0: no process
        self.ready_at: float | None = None  # CLOCK_MONOTONIC seconds; None: it boots
        self.failures = 0  # starts in a row that did not get it ready
        self.next_start: Timer | None = None
        self.exiting = ""  # why it was told to exit, or will be
        self.hurry = True  # it has graceful_timeout to exit, not drain_timeout
        self.told = False  # to exit
        self.replace_in_place = False  # when it has ended, the same slot gets its replacement
        self.replaces: WorkerProcess | None = None  # told to exit once this one is ready
        self._report = -1  # read end of its report pipe; -1: it has reported
        self._timer: Timer | None = None  # the end of the time that it has to boot, or to exit
        self._overdue = False
        self._handle = -1  # a pidfd, where it is not a child of this master

    @property
    def ready(self) -> bool:
        """Whether it has booted."""
        return self.ready_at is not None

    @property
    def retirement_request(self) -> int:
        """Why it asks to be retired: RETIREMENT_..."""
        return int(self._slot.retirement_request)

    @property
    def accepts(self) -> bool:
        """Whether it may still accept a client."""
        return self.ready and not self._slot.shut

    @property
    def fork_requested(self) -> bool:
        """Whether a template was told to fork it, and its pid is not known yet."""
        return self.pid == 0 and self._report >= 0

    def exits_within(self, seconds: float) -> bool:
        """Whether it was given a time to exit that is over by then."""
        exit_by = int(self._slot.exit_by)
        return 0 < exit_by <= time.monotonic_ns() + int(seconds * 1e9)

    # -- starting --

    def fork(
        self, generation: Generation, on_report: "Callable[[WorkerProcess, Report], None]"
    ) -> None:
        """Start a worker here, as a child of the master. Raises OSError when that cannot be."""
        read_end, write_end = os.pipe()
        # Before a worker can take anything that this slot counts, all others must count this slot.
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
        self._started(generation, pid, on_report)

    def request_fork(
        self,
        generation: Generation,
        command: Callable[[int, int], None],
        on_forked: "Callable[[WorkerProcess, int], None]",
    ) -> None:
        """Have a template fork a worker for this slot.

        `command` sends the template the slot and the descriptor of the report. `on_forked` is
        called with the worker's pid, or with 0 when there will be none. Raises OSError when the
        template cannot be told.
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
        self._spawner.loop.watch(self._report, lambda: self._read_pid(on_forked))
        self._set_timer(_FORK_SECONDS, lambda: on_forked(self, 0))

    def _read_pid(self, on_forked: "Callable[[WorkerProcess, int], None]") -> None:
        try:
            on_forked(self, int(os.read(self._report, 64) or b"0"))
        except BlockingIOError:
            return

    def let_boot(self, pid: int, on_report: "Callable[[WorkerProcess, Report], None]") -> None:
        """The process that a template has forked is this one: it may boot."""
        assert self.generation is not None
        self._started(self.generation, pid, on_report)
        with contextlib.suppress(OSError):  # it has ended already, as SIGCHLD tells
            os.write(self._report, BEGIN)

    def _started(
        self, generation: Generation, pid: int, on_report: "Callable[[WorkerProcess, Report], None]"
    ) -> None:
        self.generation, self.pid, self.ready_at = generation, pid, None
        self._slot.since = time.monotonic_ns()
        self._slot.admitted_before = self._slot.admitted
        self._slot.pid, self._slot.generation = pid, generation.number
        self._spawner.loop.watch(self._report, lambda: self._read_report(on_report))
        self._set_timer(BOOT_SECONDS, self._boot_hangs)

    def inherit(self, on_end: "Callable[[WorkerProcess], None]") -> bool:
        """Take over the worker that another master has started here; False if there is none.

        It is not a child of this process: a pidfd tells when it has ended. As with waitpid(2), all
        its descriptors are closed by then.
        """
        self.pid = self._slot.pid
        try:
            self._handle = os.pidfd_open(self.pid) if self.pid else -1
        except ProcessLookupError:
            self.clear()
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

    def _read_report(self, on_report: "Callable[[WorkerProcess, Report], None]") -> None:
        report = self.take_report()
        if report is not None:
            on_report(self, report)

    def take_report(self) -> Report | None:
        """What the worker reports of its boot, once; None when it died without a report."""
        if self._report < 0:
            return None
        try:
            data = os.read(self._report, 65536)
        except (BlockingIOError, ConnectionResetError):
            data = b""  # the worker is gone; it may have left a child that holds the pipe
        self._close_report()
        if not data:
            return None  # SIGCHLD tells how it ended
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
        self.signal(signal.SIGUSR2)  # it writes to the log where it hangs, see workers/boot.py
        self._set_timer(DUMP_SECONDS, self.kill)

    # -- ending --

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal, if there is one."""
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
        elif self.pid:
            os.kill(self.pid, number)  # the pid stays its own until this process waits for it

    def tell_to_exit(self, command: int, seconds: float | None) -> None:
        """Have the worker finish what it runs and exit, in so many seconds, or None: in its time.

        `command` is COMMAND_RETIRE or COMMAND_STOP. A worker that cannot end by itself is killed.
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

    def abandon(self, reason: str) -> None:
        """End a worker that has never accepted, or cancel its start."""
        if self.pid:
            self.exiting = reason
            self.kill()
        else:
            self.free()

    def _does_not_end(self) -> None:
        LOGGER.warning("Worker %d (pid %d) does not end: killed", self.number, self.pid)
        self.kill()

    def describe_end(self, status: int) -> str:
        """How the worker ended, in words."""
        if self._overdue:
            return f"not ready after {BOOT_SECONDS:g} s; the log shows what it was at"
        return describe_exit(status)

    def clear(self) -> None:
        """The worker has ended: give back what it held."""
        self._spawner.shared.clear(self._slot)
        handoff_sockets.discard_all(self._spawner.wakeups[self.number].take)
        self.pid, self.ready_at, self.told, self.exiting = 0, None, False, ""
        self._overdue = False
        self._cancel_timer()
        if self._handle >= 0:
            self._spawner.loop.forget(self._handle)
            os.close(self._handle)
            self._handle = -1

    def free(self) -> None:
        """Leave the slot to any generation that needs one."""
        self.cancel_start()
        self.generation, self.replaces = None, None
        self.failures, self.replace_in_place = 0, False

    def cancel_start(self) -> None:
        """Start no worker here. One that waits to boot ends at the end of file of its report."""
        if self.fork_requested:
            self._close_report()
            self._cancel_timer()
        if self.next_start is not None:
            self.next_start.cancel()
            self.next_start = None

    def _set_timer(self, seconds: float, action: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._spawner.loop.after(seconds, action)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
