"""All sessions of a worker: when each begins and ends.

A session begins with a client process's first call to a module that has an affinity, and ends when
that process ends: the kernel says so at once (pidfd). What modules have left in it is closed then;
and when the client has been silent for `stale_timeout`, and when the worker exits. If the kernel
does not tell the client process, the connection takes its place.
"""

import errno
import logging
import os
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from cpanbridge.supervisor.memory.fields import Slot
from cpanbridge.supervisor.memory.owners import BY_CONNECTION, ClientProcess
from cpanbridge.supervisor.system.start_time import start_time
from cpanbridge.workers.accept.own_threads import OwnThread
from cpanbridge.workers.client.spare_descriptors import spare
from cpanbridge.workers.sessions.session import Session, close_aside

LOGGER = logging.getLogger("cpanbridge.worker")


class Sessions:
    """All sessions of a worker. `forget` takes a client's rows out of the shared table."""

    def __init__(
        self, slot: Slot, stale_timeout: float, forget: Callable[[ClientProcess], None]
    ) -> None:
        self._slot = slot
        self._stale_timeout = stale_timeout
        self._forget = forget
        self._lock = threading.Lock()
        self._sessions: dict[ClientProcess, Session] = {}
        self._by_pid: dict[tuple[int, int], Session] = {}  # and uid
        self._by_descriptor: dict[int, Session] = {}
        # Those that silence may end, the longest silent first.
        self._silent: OrderedDict[Session, None] = OrderedDict()
        self._exiting = False
        self._ends = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ends.register(self._wake, select.EPOLLIN)
        self._watch: threading.Thread | None = None
        # Readable when the last one of a worker that leaves has ended.
        self.none_left = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def live(self) -> int:
        """How many there are; those that silence has ended do not count."""
        return int(self._slot.sessions)

    def of_process(self, pid: int, uid: int) -> Session | None:
        """The session of the process that has this pid now, as it has called for this user."""
        session = self._by_pid.get((pid, uid))
        # Where the process has ended, another one may have its pid.
        return session if session is not None and not session.has_ended() else None

    def is_live(self, process: ClientProcess | None) -> bool:
        """Whether a client has a session that silence has not ended."""
        session = self._sessions.get(process) if process is not None else None
        return session is not None and not session.expired

    def enter(self, process: ClientProcess, connection: int) -> Session:
        """The client's session, for one call; it begins if there is none. `leave` must follow.

        `connection` is the descriptor of the one that it has called on.
        Raises ProcessLookupError when the client process has ended, another OSError when there is
        no descriptor or thread to watch it by.
        """
        with self._lock:
            session = self._sessions.get(process) or self._begin(process, connection)
            session.running += 1
            return session

    def enter_for(self, process: ClientProcess, module: int) -> Session | None:
        """The same if the client's state for the module is here; None when it is not."""
        with self._lock:
            session = self._sessions.get(process)
            if session is None or module not in session.modules:
                return None
            session.running += 1
            return session

    def _begin(self, process: ClientProcess, connection: int) -> Session:
        if self._watch is None:
            watch = OwnThread(target=self._watch_ends, name="sessions", daemon=True)
            try:
                watch.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from None
            self._watch = watch
        if process.pid == BY_CONNECTION:
            descriptor = spare.open(lambda: os.dup(connection))
            events = 0  # a hang-up is told unasked, when both sides are shut down
        else:
            descriptor = spare.open(lambda: os.pidfd_open(process.pid))
            events = select.EPOLLIN
        try:
            # Asked after the descriptor was there, which is of nobody else if this is still true.
            by_connection = process.pid == BY_CONNECTION
            if not by_connection and spare.open(lambda: start_time(process.pid)) != process.start:
                raise ProcessLookupError
            self._ends.register(descriptor, events)
        except OSError:
            os.close(descriptor)
            raise
        session = Session(process, descriptor)
        if process.pid != BY_CONNECTION:
            self._by_pid[process.pid, process.uid] = session
        self._sessions[process] = self._by_descriptor[session.descriptor] = session
        self._slot.sessions += 1
        return session

    def leave(self, session: Session) -> None:
        """A call of the session has ended."""
        with self._lock:
            session.running -= 1
            session.last_used = time.monotonic()
            if session.running:
                return
            if not session.over and not session.modules:
                self._remove(session)  # nothing has come of it
            if not session.over:
                if not session.expired:
                    self._expect_silence(session)
                return
        close_aside(session)

    def _expect_silence(self, session: Session) -> None:
        """From now on it is counted how long the client is silent. Called under the lock.

        Plain modules keep their state themselves. For theirs nothing can be done before their
        worker leaves, so the client is not told either that anything is lost.
        """
        if session.is_empty and not self._exiting:
            self._silent.pop(session, None)  # it may have had something before
            return
        first = not self._silent
        self._silent[session] = None
        self._silent.move_to_end(session)
        if first:
            os.eventfd_write(self._wake, 1)

    def let_go(self) -> None:
        """The worker is to leave: from now on silence ends every session.

        Called in the main thread.
        """
        with self._lock:
            self._exiting = True
            for session in sorted(self._sessions.values(), key=lambda each: each.last_used):
                if not session.running and not session.expired:
                    self._expect_silence(session)
            self._tell_if_none_left()

    def end(self, session: Session) -> None:
        """The client has ended, or has been told that its state is lost."""
        # The rows first: whoever looks meanwhile finds a session that is over, never none.
        self._forget(session.process)
        with self._lock:
            if session.over:
                return
            has_ended = session.has_ended()
            self._remove(session)
            idle = not session.running
        if has_ended:
            # A call of it may have written a row meanwhile. One that does so from now on sees that
            # the session is over, and takes it out itself.
            self._forget(session.process)
        if idle:
            close_aside(session)

    def _remove(self, session: Session) -> None:
        session.over = True
        del self._sessions[session.process], self._by_descriptor[session.descriptor]
        pid, _, uid = session.process
        if self._by_pid.get((pid, uid)) is session:
            del self._by_pid[pid, uid]
        self._silent.pop(session, None)
        self._ends.unregister(session.descriptor)
        os.close(session.descriptor)
        if not session.expired:
            self._count_out()

    def close_all(self) -> None:
        """Close what all sessions have left. Called when the worker leaves and nothing runs."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close()

    def _count_out(self) -> None:
        self._slot.sessions -= 1
        self._tell_if_none_left()

    def _tell_if_none_left(self) -> None:
        if self._exiting and not self._slot.sessions:
            os.eventfd_write(self.none_left, 1)

    # -- the thread that watches --

    def _watch_ends(self) -> None:
        while True:
            try:
                for descriptor, _ in self._ends.poll(self._until_silence_ends_one()):
                    if descriptor == self._wake:
                        os.eventfd_read(self._wake)
                    elif (session := self._by_descriptor.get(descriptor)) is not None:
                        self.end(session)
                while (session := self._silent_for_too_long()) is not None:
                    close_aside(session)
            except Exception:
                LOGGER.exception("Watching sessions: a fault of the daemon's own")

    def _until_silence_ends_one(self) -> float | None:
        """Seconds; None: nobody is waited for."""
        with self._lock:
            oldest = next(iter(self._silent), None)
            if oldest is None:
                return None
            return max(0.0, oldest.last_used + self._stale_timeout - time.monotonic())

    def _silent_for_too_long(self) -> Session | None:
        now = time.monotonic()
        with self._lock:
            while (oldest := next(iter(self._silent), None)) is not None:
                if oldest.last_used + self._stale_timeout > now:
                    break
                del self._silent[oldest]
                if not oldest.running:  # or it is expected again when its call ends
                    oldest.expired = True
                    self._count_out()
                    return oldest
        return None
