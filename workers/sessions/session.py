"""One client process's session in this worker: what modules keep in it, and for how long.

Nothing here cuts a call that runs: what it uses is closed after it.
"""

import logging
import secrets
import select
import threading
import time
from typing import Any

from cpanbridge.supervisor.memory.owners import BY_CONNECTION, ClientProcess

LOGGER = logging.getLogger("cpanbridge.worker")


class UnknownHandle(LookupError):
    """No object of this name is in the client's session."""


class SessionEnded(RuntimeError):
    """The session's time is over, and nothing can be left in it any more."""


class Session:
    """One client process's state in this worker.

    Module authors get theirs by `current_session()`. Its methods may be called from any thread.
    """

    def __init__(self, process: ClientProcess, descriptor: int) -> None:
        self.process = process
        self.modules: set[int] = set()  # those whose state is told to be here, see affinity.py
        self.running = 0  # calls
        self.last_used = time.monotonic()
        self.over = False  # its client has ended
        self.expired = False  # its client was silent for too long, and has not been told yet
        self.descriptor = descriptor  # tells the client's end
        self._objects: dict[str, Any] = {}
        self._closed = False
        self._lock = threading.Lock()

    def keep(self, thing: Any, name: str | None = None) -> str:
        """Leave an object in the session, under a name, or for a new handle; returns which.

        A handle is never given twice, so one of a lost session finds nothing. An object that had
        the name before is closed. Raises SessionEnded, and closes the object, in a thread that
        outlives its call and the session.
        """
        name = name or secrets.token_hex(8)
        with self._lock:
            ended = self._closed
            before = self._objects.get(name)
            if not ended:
                self._objects[name] = thing
        if ended:
            close(thing)
            raise SessionEnded("the client's session has ended; the object was closed")
        if before is not None and before is not thing:
            close(before)
        return name

    def find(self, name: str) -> Any:
        """What was left under a name or for a handle. Raises UnknownHandle."""
        with self._lock:
            if name not in self._objects:
                raise UnknownHandle(
                    f"{name!r} is not in this client's session: it was dropped, or is another's"
                )
            return self._objects[name]

    def drop(self, name: str) -> None:
        """Close an object and forget it. Raises UnknownHandle."""
        thing = self.find(name)
        with self._lock:
            self._objects.pop(name, None)
        close(thing)

    def has_ended(self) -> bool:
        """Whether its client has, whoever has noticed."""
        poll = select.poll()  # of its own: one cannot be used by two threads
        poll.register(self.descriptor, select.POLLIN if self.process.pid != BY_CONNECTION else 0)
        # In this order: a descriptor that is no longer ours is closed after `over` is set.
        return bool(poll.poll(0)) or self.over

    @property
    def is_empty(self) -> bool:
        """Whether no module has left anything in it."""
        return not self._objects

    def close(self) -> None:
        """Close what is left, the newest first: a cursor before its connection."""
        with self._lock:
            self._closed = True
            things, self._objects = list(self._objects.values()), {}
        for thing in reversed(things):
            close(thing)


def close(thing: Any) -> None:
    """Call an object's `close()`, if it has one. What it raises is logged."""
    try:
        method = getattr(thing, "close", None)
        if callable(method):
            method()
    except BaseException:
        LOGGER.exception("close() of an object in a session failed")


_current = threading.local()


def current_session() -> Session:
    """The session of the client whose call runs in this thread.

    Raises RuntimeError outside of a call, and in a module without affinity, whose calls reach any
    worker.
    """
    session: Session | None = getattr(_current, "session", None)
    if session is None:
        raise RuntimeError(
            'No session: this thread does not run a call to a module of affinity "client" or '
            '"module"'
        )
    return session


def run_in(session: Session | None) -> None:
    """Let `current_session` return this one, in this thread; None: there is none any more."""
    _current.session = session


def close_aside(session: Session) -> None:
    """Close what is left in a session, where nobody has to wait for it."""
    if session.is_empty:
        session.close()
        return
    try:
        threading.Thread(target=session.close, name="close", daemon=True).start()
    except RuntimeError:  # no more threads
        session.close()
