"""Handing a daemon over to a new master: what the old master does in an upgrade.

It serves on, but uses no further slot. It stands still from when the new master is ready until that
has taken over, and then leaves everything to it. When the new master fails before that, nothing has
changed. Called in the old master.
"""

import logging
import os
import signal

from cpanbridge.supervisor.lifecycle.mastership import Mastership
from cpanbridge.supervisor.lifecycle.reload import OnDone, Reloader
from cpanbridge.supervisor.lifecycle.upgrade import Estate, Successor
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.log_text import describe_exit

LOGGER = logging.getLogger("cpanbridge.master")


class Handover:
    """From this master to the next one, whenever an upgrade is requested.

    `complete` says that another master has taken over, so that this one must exit and leave
    everything as it is.
    """

    def __init__(
        self, loop: Loop, pool: WorkerPool, reloader: Reloader, mastership: Mastership
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._reloader = reloader
        self._mastership = mastership
        self._successor: Successor | None = None
        self._standing_still = False
        self._deferred: list[int] = []  # signals
        self.complete = False

    @property
    def successor(self) -> int:
        """The pid of the new master; 0: there is none."""
        return self._successor.pid if self._successor is not None else 0

    def begin(self, on_done: OnDone) -> None:
        """Start a new master; `on_done` is called once: with None when it has taken over."""
        self._pool.confine()
        estate = Estate(
            self._pool.held(), self._mastership.held(), self._reloader.generation.number
        )

        def failed(reason: str) -> None:
            self._go_on()
            LOGGER.error("Not upgraded, nothing has changed: %s", reason)
            on_done(reason)

        def taken(pid: int) -> None:
            LOGGER.info("Handed over to pid %d", pid)
            on_done(None)
            self._leave_to(pid)

        try:
            self._successor = Successor(self._loop, estate, self._stand_still, taken, failed)
        except OSError as error:
            failed(f"the new master cannot be started: {error.strerror}")
            return
        LOGGER.info("Upgrading: the new master is pid %d", self._successor.pid)

    def give_up(self, reason: str) -> None:
        """End the new master, if there is one."""
        if self._successor is not None:
            self._successor.give_up(reason)

    def defers(self, number: int) -> bool:
        """Whether a signal has come while this master stands still and must not act on it.

        The new master gets it, or this one once more.
        """
        if not self._standing_still or number == signal.SIGCHLD:
            return False
        self._deferred.append(number)
        return True

    @property
    def children(self) -> int:
        """Which children to wait for, as waitpid(2) takes it: -1 means all.

        While this master stands still, the workers are the new one's business.
        """
        return self.successor if self._standing_still else -1

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was not the new master."""
        if self._successor is not None and pid == self._successor.pid:
            self._successor.ended(describe_exit(status))

    def _stand_still(self) -> None:
        """The new master is ready: do nothing more that it would not know of."""
        self._standing_still = True
        self._pool.stand_still()
        self._mastership.suspend()
        assert self._successor is not None
        self._successor.hand_over()

    def _go_on(self) -> None:
        """There is no new master after all."""
        self._successor = None
        self._pool.end_workers_of_new_master(self._reloader.generation)
        self._pool.go_on()
        if self._standing_still:
            self._standing_still = False
            self._mastership.resume()
            deferred, self._deferred = self._deferred, []
            for number in (signal.SIGCHLD, *deferred):
                os.kill(os.getpid(), number)

    def _leave_to(self, pid: int) -> None:
        self._mastership.give_to(pid)
        for number in self._deferred:
            os.kill(pid, number)
        self.complete = True
