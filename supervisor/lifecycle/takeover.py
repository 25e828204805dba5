"""Taking a daemon over from another master: what the new master does in an upgrade.

It boots a generation of its own, as in a reload, and serves nothing until the old master stands
still. When the old master dies, this one is the master at once, with the old workers, whether or
not its own have booted. Called in the new master.
"""

import logging
import os
from collections.abc import Callable

from cpanbridge.supervisor.lifecycle.mastership import Mastership
from cpanbridge.supervisor.lifecycle.reload import Reloader
from cpanbridge.supervisor.lifecycle.upgrade import Inherited, Predecessor
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.version import __version__

LOGGER = logging.getLogger("cpanbridge.master")


class Takeover:
    """From the master before to this one.

    `on_taken` is called when the daemon is this one's. The reload by which its own workers replace
    the old ones may still be under way then.
    """

    def __init__(
        self,
        loop: Loop,
        inherited: Inherited,
        pool: WorkerPool,
        reloader: Reloader,
        mastership: Mastership,
        on_taken: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._reloader = reloader
        self._mastership = mastership
        self._on_taken = on_taken
        self._booted = False
        reloader.generation.put_in_service()
        pool.will_inherit(reloader.generation, inherited.estate.pool)
        self._predecessor: Predecessor | None = Predecessor(
            loop, inherited.end, self._take_over, mastership.speak
        )

    @property
    def pending(self) -> bool:
        """Whether another master still has the daemon."""
        return self._predecessor is not None

    def ready(self) -> None:
        """The new generation has booted."""
        assert self._predecessor is not None
        self._booted = True
        self._predecessor.ready()

    def refuse(self, reason: str) -> None:
        """This master cannot take over."""
        if self._predecessor is not None:
            self._predecessor.refuse(reason)

    def _take_over(self) -> None:
        """The old master does nothing any more: the daemon is this one's, and its workers.

        An old worker that dies before the new generation serves is not replaced: that one boots
        already.
        """
        coming = self._reloader.coming
        if self._predecessor is None or coming is None:
            return  # this master has refused meanwhile
        try:
            self._mastership.take()
        except InstanceError as error:  # no disk space for its pid, by which others find it
            self._reloader.give_up(str(error))
            return
        predecessor, self._predecessor = self._predecessor, None
        predecessor.taken()
        self._pool.inherit(self._reloader.generation)
        LOGGER.info("cpanbridged %s takes over: pid %d", __version__, os.getpid())
        self._on_taken()
        if self._booted:
            self._reloader.ready(coming)
