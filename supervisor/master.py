"""The master process: fork the workers, watch them, replace them, stop them.

It is single-threaded, so that forking is safe, runs no module code and reads no client bytes. It
waits in one place, on a signal wake-up descriptor and the workers' report pipes; nothing is polled.
A signal NAME is handled by the method `handle_name`.

Every worker sits in a seat, which is its slot in the shared memory and what the master knows of it.
A worker that dies is replaced at once. One that dies before it is ready is replaced after a pause
that grows each time, and one that dies within a second of being ready after half a second: a broken
module is never a hot loop.
"""

import gc
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import setproctitle

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.listener import Listener
from cpanbridge.supervisor.place import Place, Report, WorkerMain, read_report
from cpanbridge.supervisor.shared import Shared, slot_capacity
from cpanbridge.supervisor.version import __version__

LOGGER = logging.getLogger("cpanbridge.master")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
SETTLED_SECONDS = 1.0  # one that was ready for so long did not die of its start
PAUSE_AFTER_READY = 0.5  # for one that was not
# A worker ends by itself at graceful_timeout, but its shutdown hooks have a second at least; one
# that cannot end is killed after this.
KILL_MARGIN = 3.0

_SIGNALS = ("TERM", "INT", "QUIT", "HUP", "CHLD", "USR1", "USR2", "TTIN", "TTOU")


@dataclass
class Seat:
    """What the master knows of the worker in a slot."""

    slot: int
    pid: int = 0  # 0: empty
    report: int = -1  # read end of its report pipe; -1: it has reported
    ready: bool = False
    ready_at: float = 0.0
    failures: int = 0  # starts in a row that did not get it ready
    refill_at: float | None = None


class Master:
    """The master of one daemon, from its first fork to its last wait.

    `on_ready` is called once: with None when all workers are ready, or with the reason why the
    daemon does not start.
    """

    def __init__(
        self,
        settings: Settings,
        source: str,
        listeners: Sequence[Listener],
        worker_main: WorkerMain,
        on_ready: Callable[[str | None], None],
    ) -> None:
        self._settings = settings
        self._source = source
        self._listeners = listeners
        self._worker_main = worker_main
        self._on_ready = on_ready
        self._generation = 1
        capacity = slot_capacity(settings.worker_count)
        self._shared = Shared.create(capacity, settings.limits, used=settings.worker_count)
        self._bells = [Bells.hang() for _ in range(capacity)]
        # Workers hold the read end only, so it ends when the master does, however that happens.
        self._lifeline, self._life = os.pipe()
        self._seats = [Seat(number) for number in range(settings.worker_count)]
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._started = False
        self._stopping = False
        self._kill_at: float | None = None
        self._exit_status = 0

    def run(self) -> int:
        """Be the master until the daemon has stopped. Returns the exit status, 0 or 1."""
        setproctitle.setproctitle(f"cpanbridged: master [{self._source}]")
        self._catch_signals()
        gc.freeze()  # what exists now is shared with the workers; keep the collector off it
        for seat in self._seats:
            self._fork(seat)
        while not (self._stopping and all(seat.pid == 0 for seat in self._seats)):
            for key, _ in self._selector.select(self._until_next_timer()):
                if key.fileobj is self._signals:
                    self._handle_signals()
                elif key.fd == key.data.report:  # it may have been closed in this round
                    self._read_report(key.data, key.data.pid)
            self._run_timers()
        for name in _SIGNALS:  # Python would put the defaults back while it ends
            if name != "CHLD":
                signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
        LOGGER.info("Stopped")
        return self._exit_status

    # -- signals --

    def _catch_signals(self) -> None:
        for end in (self._signals, self._wakeup):
            end.setblocking(False)
        self._selector.register(self._signals, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for name in _SIGNALS:
            signal.signal(signal.Signals[f"SIG{name}"], lambda *_: None)

    def _handle_signals(self) -> None:
        numbers = dict.fromkeys(self._signals.recv(4096))
        numbers[signal.SIGCHLD] = None  # of many at once, some may not have been written
        for number in numbers:
            name = signal.Signals(number).name.removeprefix("SIG").lower()
            getattr(self, f"handle_{name}")()

    def handle_term(self) -> None:
        """Stop gracefully: no new client, running requests finish."""
        if not self._stopping:
            LOGGER.info("Stopping: running requests may take %g s", self._graceful_timeout)
            self._stop(signal.SIGTERM)
            self._kill_at = time.monotonic() + self._graceful_timeout + KILL_MARGIN

    def handle_int(self) -> None:
        """Ctrl-C on `cpanbridged run`: the same."""
        self.handle_term()

    def handle_quit(self) -> None:
        """Stop at once."""
        LOGGER.info("Stopping at once")
        self._stop(signal.SIGKILL)

    def handle_chld(self) -> None:
        """Some children have ended; signals of the same kind merge, so ask until there is none.

        Not only workers: as process 1 of a container the master inherits what they leave behind.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for seat in self._seats:
                if seat.pid == pid:
                    self._worker_ended(seat, status)

    def handle_hup(self) -> None:
        """A terminal that closes, or a request for what this version does not have."""
        LOGGER.warning("SIGHUP: this version cannot reload; restart to apply a changed setting")

    def handle_usr1(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGUSR1: this version cannot reopen its logs; restart it instead")

    def handle_usr2(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGUSR2: this version cannot upgrade in place; restart it instead")

    def handle_ttin(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGTTIN: this version cannot add a worker; set workers and restart")

    def handle_ttou(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGTTOU: this version cannot remove a worker; set workers and restart")

    # -- workers --

    def _fork(self, seat: Seat) -> None:
        if self._stopping:
            return
        seat.refill_at = None
        try:
            read_end, write_end = os.pipe()
        except OSError as error:
            self._cannot_fork(seat, error)
            return
        # A signal between the fork and the child's own handlers would be told to the master.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError as error:
            os.close(read_end)
            os.close(write_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self._cannot_fork(seat, error)
            return
        if pid == 0:
            os.close(read_end)
            self._become_worker(seat, write_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(write_end)
        os.set_blocking(read_end, False)
        seat.pid, seat.report, seat.ready = pid, read_end, False
        slot = self._shared.slots[seat.slot]
        slot.pid, slot.generation = pid, self._generation
        self._selector.register(read_end, selectors.EVENT_READ, seat)

    def _cannot_fork(self, seat: Seat, error: OSError) -> None:
        LOGGER.error("Worker %d: cannot fork: %s", seat.slot, error.strerror)
        if self._started:
            self._schedule_refill(seat)
        else:
            self._give_up_start(f"cannot fork a worker: {error.strerror}")

    def _become_worker(self, seat: Seat, report: int) -> NoReturn:
        """Called in the child: let go of what is the master's alone, and never come back."""
        try:
            self._selector.close()
            self._signals.close()
            self._wakeup.close()
            os.close(self._life)
            for other in self._seats:
                if other.report >= 0:
                    os.close(other.report)
            self._worker_main(
                Place(
                    slot=seat.slot,
                    generation=self._generation,
                    settings=self._settings,
                    shared=self._shared,
                    bells=self._bells,
                    listeners=[listener.socket for listener in self._listeners],
                    lifeline=self._lifeline,
                    report=report,
                )
            )
        except BaseException:
            LOGGER.exception("Worker %d cannot begin", seat.slot)
        finally:
            os._exit(1)

    def _read_report(self, seat: Seat, pid: int) -> None:
        try:
            data = os.read(seat.report, 65536)
        except BlockingIOError:
            data = b""  # the worker is gone, but left a child that holds the pipe
        self._close_report(seat)
        if not data:
            return  # it died without a word; SIGCHLD says how
        report = read_report(data)
        if report.error is not None:
            self._cannot_boot(seat, report)
            return
        seat.ready = True
        seat.failures = 0
        seat.ready_at = time.monotonic()
        LOGGER.info("Worker %d ready (pid %d)", seat.slot, pid)
        if not self._started and all(other.ready for other in self._seats):
            self._started = True
            LOGGER.info(
                "cpanbridged %s ready: pid %d, %d workers, listening on %s",
                __version__,
                os.getpid(),
                len(self._seats),
                ", ".join(listener.path for listener in self._listeners),
            )
            self._on_ready(None)

    def _cannot_boot(self, seat: Seat, report: Report) -> None:
        LOGGER.error("Worker %d cannot start: %s", seat.slot, report.error)
        self._give_up_start(report.error or "")

    def _give_up_start(self, reason: str) -> None:
        """A worker that does not boot before the daemon was ready: there is no daemon."""
        if not self._started and not self._stopping:
            self._exit_status = 1
            self._stop(signal.SIGKILL, reason)

    def _close_report(self, seat: Seat) -> None:
        if seat.report >= 0:
            self._selector.unregister(seat.report)
            os.close(seat.report)
            seat.report = -1

    def _worker_ended(self, seat: Seat, status: int) -> None:
        pid, seat.pid = seat.pid, 0
        if seat.report >= 0:
            self._read_report(seat, pid)  # what it said last may not have been read yet
        how = describe_exit(status)
        self._shared.clear(self._shared.slots[seat.slot])
        if self._stopping:
            return
        if not self._started:
            LOGGER.error("Worker %d (pid %d) died at boot: %s", seat.slot, pid, how)
            self._give_up_start(f"worker {seat.slot} died at boot: {how}")
            return
        self._shared.header.deaths += 1
        LOGGER.error("Worker %d (pid %d) died: %s; replacing it", seat.slot, pid, how)
        if not seat.ready:
            self._schedule_refill(seat)
        elif time.monotonic() - seat.ready_at < SETTLED_SECONDS:
            seat.refill_at = time.monotonic() + PAUSE_AFTER_READY
        else:
            self._fork(seat)

    def _schedule_refill(self, seat: Seat) -> None:
        """Start it again after a pause that grows with each start that has failed in a row."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**seat.failures)
        seat.failures = min(seat.failures + 1, 16)
        seat.refill_at = time.monotonic() + pause
        LOGGER.warning("Worker %d: next start in %.1f s", seat.slot, pause)

    # -- stopping and timers --

    @property
    def _graceful_timeout(self) -> float:
        return self._settings.limits.graceful_timeout

    def _stop(self, worker_signal: signal.Signals, reason: str = "told to stop") -> None:
        if not self._started and not self._stopping:
            self._on_ready(reason)
        self._stopping = True
        for listener in self._listeners:
            try:
                listener.unlink()
            except OSError as error:
                LOGGER.warning("%s: cannot be removed: %s", listener.path, error.strerror)
            listener.socket.close()
        for seat in self._seats:
            seat.refill_at = None
            if seat.pid:
                os.kill(seat.pid, worker_signal)

    def _until_next_timer(self) -> float | None:
        times = [seat.refill_at for seat in self._seats if seat.refill_at is not None]
        if self._kill_at is not None:
            times.append(self._kill_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _run_timers(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.refill_at is not None and seat.refill_at <= now:
                self._fork(seat)
        if self._kill_at is not None and self._kill_at <= now:
            self._kill_at = None
            for seat in self._seats:
                if seat.pid:
                    LOGGER.warning("Worker %d (pid %d) does not end: killed", seat.slot, seat.pid)
                    os.kill(seat.pid, signal.SIGKILL)


def describe_exit(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"killed by signal {-code} ({name})"
