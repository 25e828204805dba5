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
from collections.abc import Callable, Iterator

from cpanbridge.supervisor.config import KILL_MARGIN
from cpanbridge.supervisor.memory.connection_table import RunningCall
from cpanbridge.supervisor.memory.fields import COMMAND_NONE, COMMAND_RETIRE
from cpanbridge.supervisor.processes.context import BEGIN, Report, WorkerContext, read_report
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.spawner import Process, Spawner
from cpanbridge.supervisor.processes.templates import Template
from cpanbridge.supervisor.system.start_time import start_time

LOGGER = logging.getLogger("cpanbridge.master")

_CALLS_TOLD = 20  # of those that a worker was running when it ended
_FORK_SECONDS = 10.0  # for a template to fork a worker, which takes it some milliseconds


class WorkerProcess(Process):
    """One slot and its worker process.

    `on_report` is called when it is ready or cannot boot. `on_forked` is called with its pid when a
    template has forked it, or with 0 when that will not be. `on_left` is called when a worker that
    another master has started has ended.
    """

    def __init__(
        self,
        spawner: Spawner,
        number: int,
        on_report: "Callable[[WorkerProcess, Report], None]",
        on_forked: "Callable[[WorkerProcess, int], None]",
        on_left: "Callable[[WorkerProcess], None]",
    ) -> None:
        super().__init__(spawner)
        self._on_report = on_report
        self._on_forked = on_forked
        self._on_left = on_left
        self._report = -1  # where it will report; -1: it has
        self._handle = -1  # a pidfd, where it is not a child of this master
        self.slot = spawner.shared.slots[number]
        self.number = number
        self.generation: Generation | None = None  # None: the slot is free
        self.ready_at: float | None = None  # CLOCK_MONOTONIC seconds; None: it boots
        self.failures = 0  # starts in a row that did not get it ready
        self.failure = ""  # why the last one here could not start, or died
        self.exiting = ""  # why it was told to exit, or will be
        self.hurry = True  # it has graceful_timeout to exit, not drain_timeout
        # The slot of its replacement, which is ready before this one is told to exit. Its own: the
        # replacement starts when this one has ended.
        self.replacement: WorkerProcess | None = None

    @property
    def ready(self) -> bool:
        """Whether it has booted."""
        return self.ready_at is not None

    @property
    def told(self) -> bool:
        """Whether it was told to exit."""
        return bool(self.slot.command != COMMAND_NONE)

    @property
    def serves(self) -> bool:
        """Whether it accepts clients, or is about to."""
        return self.ready and not self.told

    @property
    def fork_requested(self) -> bool:
        """Whether a template was told to fork it, and its pid is not known yet."""
        return self.pid == 0 and self._report >= 0

    # -- starting --

    def fork(self, generation: Generation) -> None:
        """Start a worker here, as a child of the master. Raises OSError when that cannot be."""
        with self._new_report() as (ours, theirs):

            def main(context: WorkerContext) -> None:
                ours.close()
                report = theirs.detach()
                self._spawner.mains.worker(context._replace(slot=self.number, report=report))

            pid = self._spawner.fork(f"Worker {self.number}", generation, main)
        self.generation = generation
        self._boots(pid)

    def request_fork(self, template: Template) -> None:
        """Have a template fork it. Raises OSError when the template cannot be told."""
        with self._new_report() as (_, theirs):
            template.command(self.number, theirs.fileno())
        self.generation = template.generation
        self._spawner.loop.watch(self._report, self._read_pid)
        self.after(_FORK_SECONDS, lambda: self._on_forked(self, 0))

    @contextlib.contextmanager
    def _new_report(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """The master's end and the worker's, for it to report by."""
        # Before a worker can take anything that this slot counts, all others must count this slot.
        self._spawner.shared.use_slot(self.number)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            yield ours, theirs
            ours.setblocking(False)
            self._report = ours.detach()

    def _read_pid(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._on_forked(self, int(os.read(self._report, 64) or b"0"))

    def let_boot(self, pid: int) -> None:
        """The process that a template has forked is this one: it may boot."""
        self._boots(pid)
        with contextlib.suppress(OSError):  # it has ended already, as SIGCHLD tells
            os.write(self._report, BEGIN)

    def _boots(self, pid: int) -> None:
        assert self.generation is not None
        self.failure = ""
        self.slot.since = time.monotonic_ns()
        self.slot.admitted_before = self.slot.admitted
        self._spawner.unattended.attend(self.number)
        with contextlib.suppress(OSError):
            self.slot.started = 0
            self.slot.started = start_time(pid) or 0
        self.slot.pid, self.slot.generation = pid, self.generation.number
        self._spawner.loop.watch(self._report, self._read_report)
        self._started(pid)

    def inherit(self) -> bool:
        """Take over the worker that another master has started here; False if there is none.

        It is not a child of this process: a pidfd tells when it has ended. As with waitpid(2), all
        its descriptors are closed by then. If it has ended before, its pid may be a stranger's.
        """
        if not self.slot.pid:
            return False
        self.pid = self.slot.pid
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(self.pid)
        if self._handle < 0 or not self._is_still(self.pid):
            self.clear()
            return False
        self.ready_at = time.monotonic()
        self._spawner.loop.watch(self._handle, lambda: self._on_left(self))
        if self.told:
            self.exiting = "told by the master before this one"
            if self.slot.exit_by:
                left = (self.slot.exit_by - time.monotonic_ns()) / 1e9
                self.after(left + KILL_MARGIN, self._does_not_end)
        return True

    def _is_still(self, pid: int) -> bool:
        """Whether a process is the one that was started here, as far as can be told."""
        try:
            return self.slot.started in (0, start_time(pid))
        except OSError:
            return True  # it cannot be told for now

    def _read_report(self) -> None:
        report = self.take_report(ended=False)
        if report is not None:
            self._on_report(self, report)

    def take_report(self, *, ended: bool) -> Report | None:
        """How the worker's boot went, once; None while it is not over, or when it died first.

        When it has `ended`, it may have left a child that holds the pipe: nothing more will come.
        """
        report: Report | None = None
        try:
            while self._report >= 0 and report is None:
                report = read_report(os.read(self._report, 65536))
                if report is not None and report.importing is not None:
                    self.importing, report = report.importing, None
                else:
                    self._close_report()
        except BlockingIOError:
            if ended:
                self._close_report()
        except ConnectionResetError:
            self._close_report()
        if report is None:
            return None  # SIGCHLD tells how it ended
        self._timer.cancel()
        self.importing = ""
        if report.error is None:
            self.ready_at = time.monotonic()
        return report

    def _close_report(self) -> None:
        self._spawner.loop.forget(self._report)
        os.close(self._report)
        self._report = -1

    # -- ending --

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal, if there is one."""
        if self._handle < 0:
            super().signal(number)
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def drain(self, reason: str) -> None:
        """Have the worker exit within `drain_timeout`, without a replacement."""
        self.replacement = None
        if not self.ready:
            self.abandon(reason)
        elif not self.told:
            self.exiting, self.hurry = reason, False
            self.tell_to_retire()

    def tell_to_retire(self) -> None:
        """Have the worker finish what it runs and exit, in the time that it has."""
        assert self.generation is not None
        limits = self.generation.settings.limits
        seconds = limits.graceful_timeout if self.hurry else limits.drain_timeout or None
        self.tell_to_exit(COMMAND_RETIRE, seconds)

    def tell_to_exit(self, command: int, seconds: float | None) -> None:
        """Have the worker finish what it runs and exit, in so many seconds, or None: in its time.

        `command` is COMMAND_RETIRE, _STOP or _RESTART. A worker that cannot end itself is killed.
        """
        self.slot.command = command
        self.slot.exit_by = time.monotonic_ns() + int(seconds * 1e9) if seconds is not None else 0
        self._timer.cancel()
        if seconds is not None:
            self.after(seconds + KILL_MARGIN, self._does_not_end)
        self.signal(signal.SIGTERM)

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

    def describe_running(self) -> str:
        """What the worker ran when it ended, and for whom, in words; empty when it ran nothing."""
        shared = self._spawner.shared
        calls = shared.statistics[self.number].connection_table.running()
        name = shared.names.of
        told = [f"{name(each.function)} for {_client(each)}" for each in calls[:_CALLS_TOLD]]
        if len(calls) > len(told):
            told.append(f"{len(calls) - len(told)} more")
        return f"; it ran {', '.join(told)}" if told else ""

    def clear(self) -> None:
        """The worker has ended: give back what it held."""
        self._spawner.shared.clear(self.slot)
        self._spawner.unattended.leave(self.number)
        self.pid, self.ready_at, self.exiting, self._overdue = 0, None, "", False
        self.importing = ""
        self._timer.cancel()
        if self._handle >= 0:
            self._spawner.loop.forget(self._handle)
            os.close(self._handle)
            self._handle = -1

    def free(self) -> None:
        """Leave the slot to any generation that needs one."""
        self.cancel_start()
        self.generation, self.replacement, self.failures = None, None, 0

    def cancel_start(self) -> None:
        """Start no worker here. One that waits to boot ends at the end of file of its report."""
        if self.fork_requested:
            self._close_report()
        if not self.pid:
            self._timer.cancel()


def _client(call: RunningCall) -> str:
    pid = f"pid {call.pid}" if call.pid else ""
    return f"{call.caller} ({pid})" if call.caller and pid else call.caller or pid or "a client"
