"""A seat: a slot of the shared memory, and what the master knows of the worker in it.

A seat is free, or belongs to a generation. Its worker boots, serves, and at some time leaves: it is
told to by an order in its slot and a TERM, and killed when it does not go. Which workers there
should be is not decided here but in `workforce.py`. Called in the master, but where it says
otherwise.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NoReturn

from cpanbridge.supervisor import logs, notify, postbox
from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.listener import Listener
from cpanbridge.supervisor.logs import LogSettings
from cpanbridge.supervisor.loop import Loop, Timer
from cpanbridge.supervisor.place import Place, Report, WorkerMain, read_report
from cpanbridge.supervisor.shared import ORDER_NONE, Shared
from cpanbridge.supervisor.text import describe_exit

LOGGER = logging.getLogger("cpanbridge.master")

# A module that takes longer to import is taken to hang.
BOOT_SECONDS = 60.0
_DUMP_SECONDS = 0.5  # to write where it hangs
# A worker ends by itself when its time is over, but its shutdown hooks have a second at least; one
# that cannot end is killed after this.
KILL_MARGIN = 3.0


class Stage(Enum):
    """How far a generation has come."""

    BOOTS = "boots"
    SERVES = "serves"
    OVER = "over"  # another one has taken over, or it has never been wanted


class Generation:
    """What all workers of one start or reload have in common."""

    def __init__(
        self, number: int, settings: Settings, listeners: Sequence[Listener], log: LogSettings
    ) -> None:
        self.number = number
        self.settings = settings
        self.listeners = listeners
        self.log = log
        self.wanted = settings.worker_count  # workers
        self.stage = Stage.BOOTS
        self.opening = os.eventfd(0, os.EFD_CLOEXEC)

    @property
    def in_service(self) -> bool:
        """Whether its workers may accept, and those that die are replaced."""
        return self.stage is Stage.SERVES

    def put_in_service(self) -> None:
        """Let its workers accept."""
        self.stage = Stage.SERVES
        os.eventfd_write(self.opening, 1)

    def close(self) -> None:
        """No worker belongs to it any more."""
        os.close(self.opening)


class Company:
    """What all workers of a master have in common."""

    def __init__(
        self, loop: Loop, shared: Shared, bells: Sequence[Bells], worker_main: WorkerMain
    ) -> None:
        self.loop = loop
        self.shared = shared
        self.bells = bells
        self.worker_main = worker_main
        # Workers hold the read end only, so it ends when the master does, however that happens.
        self.lifeline, self.life = os.pipe()
        # Rung by a worker that asks to be retired.
        self.plea = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.inherited_life: list[int] = []  # the same of masters before this one


class Seat:
    """One slot and its worker."""

    def __init__(self, company: Company, number: int) -> None:
        self._company = company
        self._slot = company.shared.slots[number]
        self.number = number
        self.generation: Generation | None = None  # None: free
        self.pid = 0  # 0: no worker
        self.ready_at: float | None = None  # CLOCK_MONOTONIC; None: it boots
        self.failures = 0  # starts in a row that did not get it ready
        self.refill: Timer | None = None  # its next start
        self.leaving = ""  # why its worker was told to leave, or will be
        self.hurry = True  # it has graceful_timeout for that, not drain_timeout
        self.told = False
        self.refill_after = False  # when it has left, the same seat gets its replacement
        self.replaces: Seat | None = None  # told to leave once the worker here is ready
        self._report = -1  # read end of the worker's report pipe; -1: it has reported
        self._timer: Timer | None = None  # the end of what it may take to boot, or to leave
        self._overdue = False
        self._handle = -1  # a pidfd, where the worker is not this process's child

    @property
    def ready(self) -> bool:
        """Whether its worker has booted."""
        return self.ready_at is not None

    @property
    def plea(self) -> int:
        """Why the worker asks to be retired: PLEA_..."""
        return int(self._slot.plea)

    def leaves_within(self, seconds: float) -> bool:
        """Whether the worker was given a time to leave that is over by then."""
        leave_by = int(self._slot.leave_by)
        return 0 < leave_by <= time.monotonic_ns() + int(seconds * 1e9)

    @property
    def lets_in(self) -> bool:
        """Whether its worker may still accept a client."""
        return self.ready and not self._slot.shut

    def fork(self, generation: Generation, on_report: "Callable[[Seat, Report], None]") -> None:
        """Put a worker here. Raises OSError when there cannot be one."""
        read_end, write_end = os.pipe()
        # Before there is a worker that could take room in this slot, the others look at it.
        self._company.shared.use_slot(self.number)
        # A signal between the fork and the child's own handlers would be told to the master.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError:
            os.close(read_end)
            os.close(write_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            raise
        if pid == 0:
            os.close(read_end)
            self._become_worker(generation, write_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(write_end)
        os.set_blocking(read_end, False)
        self.generation, self.pid, self.ready_at, self._report = generation, pid, None, read_end
        self._slot.since = time.monotonic_ns()
        self._slot.admitted_before = self._slot.admitted
        self._slot.pid, self._slot.generation = pid, generation.number
        self._company.loop.watch(read_end, lambda: self._read_report(on_report))
        self._set_timer(BOOT_SECONDS, self._boot_hangs)

    def adopt(self, on_end: "Callable[[Seat], None]") -> bool:
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
        self._company.loop.watch(self._handle, lambda: on_end(self))
        if self._slot.order != ORDER_NONE:
            self.told, self.leaving = True, "told by the master before this one"
            if self._slot.leave_by:
                left = (self._slot.leave_by - time.monotonic_ns()) / 1e9
                self._set_timer(left + KILL_MARGIN, self._does_not_end)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal, if there is one."""
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
        elif self.pid:
            os.kill(self.pid, number)  # it is there until this process waits for it

    def _become_worker(self, generation: Generation, report: int) -> NoReturn:
        """Called in the child: let go of what is the master's alone, and never come back."""
        company = self._company
        try:
            plea = os.dup(company.plea)
            company.loop.let_go()
            for life in (company.life, *company.inherited_life):
                os.close(life)
            logs.configure(generation.log)
            for name in notify.VARIABLES:
                os.environ.pop(name, None)
            company.worker_main(
                Place(
                    slot=self.number,
                    generation=generation.number,
                    settings=generation.settings,
                    shared=company.shared,
                    bells=company.bells,
                    listeners=[listener.socket for listener in generation.listeners],
                    lent=any(listener.lent for listener in generation.listeners),
                    lifeline=company.lifeline,
                    report=report,
                    opening=generation.opening,
                    plea=plea,
                    reopen_logs=logs.reopen,
                )
            )
        except BaseException:
            LOGGER.exception("Worker %d cannot begin", self.number)
        finally:
            os._exit(1)

    def _read_report(self, on_report: "Callable[[Seat, Report], None]") -> None:
        report = self.take_report()
        if report is not None:
            on_report(self, report)

    def take_report(self) -> Report | None:
        """What the worker says of its boot, once; None when it died without a word."""
        if self._report < 0:
            return None
        try:
            data = os.read(self._report, 65536)
        except BlockingIOError:
            data = b""  # the worker is gone, but left a child that holds the pipe
        self._company.loop.forget(self._report)
        os.close(self._report)
        self._report = -1
        if not data:
            return None  # SIGCHLD says how it ended
        report = read_report(data)
        self._cancel_timer()
        if report.error is None:
            self.ready_at = time.monotonic()
        return report

    def _boot_hangs(self) -> None:
        self._overdue = True
        self.signal(signal.SIGUSR2)  # it writes where it is to the log, see workers/worker.py
        self._set_timer(_DUMP_SECONDS, self.kill)

    def describe_end(self, status: int) -> str:
        """How the worker ended, in words."""
        if self._overdue:
            return f"not ready after {BOOT_SECONDS:g} s; the log shows what it was at"
        return describe_exit(status)

    def tell_to_leave(self, order: int, seconds: float | None) -> None:
        """Have the worker finish what it runs and leave, in so many seconds, or None: in its time.

        `order` is one of `ORDER_RETIRE` and `ORDER_STOP`. One that cannot end by itself is killed.
        """
        self.told = True
        self._slot.order = order
        self._slot.leave_by = time.monotonic_ns() + int(seconds * 1e9) if seconds is not None else 0
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
        self._company.shared.clear(self._slot)
        postbox.throw_away(self._company.bells[self.number].take)
        self.pid, self.ready_at, self.told, self.leaving = 0, None, False, ""
        self._overdue = False
        self._cancel_timer()
        if self._handle >= 0:
            self._company.loop.forget(self._handle)
            os.close(self._handle)
            self._handle = -1

    def free(self) -> None:
        """Nobody is to sit here any more, until a generation takes the seat."""
        self.cancel_refill()
        self.generation, self.replaces = None, None
        self.failures, self.refill_after = 0, False

    def cancel_refill(self) -> None:
        """Start nobody here."""
        if self.refill is not None:
            self.refill.cancel()
            self.refill = None

    def _set_timer(self, seconds: float, action: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._company.loop.after(seconds, action)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
