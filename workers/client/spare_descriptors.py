"""Descriptors that a worker keeps for what must not fail when all others are used up.

While they are kept, accept(2) is what fails first: a worker accepts no more clients before those
that it has lack anything. What must have a descriptor to go on with a client gets one of these: one
that is handed over, and what tells who a client is and when it ends.

They belong to the process, as its limit does (RLIMIT_NOFILE), so there is one set of them. Module
code may take what is given up here for an instant; then there is none left, which is an OSError as
ever.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

KEPT = 8

T = TypeVar("T")


class SpareDescriptors:
    """The spare descriptors of a process. Called in any thread, but for what says otherwise."""

    def __init__(self) -> None:
        self._wanted = 0
        self._kept: list[int] = []
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Keep some from now on. Called once in a worker."""
        self._wanted = KEPT
        self.restore()

    def restore(self) -> bool:
        """Keep as many as there should be again; False when too few are left for that."""
        if len(self._kept) == self._wanted:
            return True
        with self._lock:
            return self._restore()

    def _restore(self) -> bool:
        with contextlib.suppress(OSError):
            while len(self._kept) < self._wanted:
                self._kept.append(os.eventfd(0, os.EFD_CLOEXEC))
        return len(self._kept) == self._wanted

    def open(self, opens: Callable[[], T]) -> T:
        """What a function returns that opens a descriptor: one of these if there is no other.

        Raises what it raises.
        """
        try:
            return opens()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        with self.given_up(1):
            return opens()

    @contextlib.contextmanager
    def given_up(self, count: int) -> Iterator[None]:
        """Meanwhile so many more may be opened; those that are closed again are kept again."""
        with self._lock:
            for _ in range(min(count, len(self._kept))):
                os.close(self._kept.pop())
            try:
                yield
            finally:
                self._restore()

    def let_go(self) -> None:
        """Close all. Called in a process that a module has forked."""
        self._wanted = 0
        while self._kept:
            os.close(self._kept.pop())


spare = SpareDescriptors()
