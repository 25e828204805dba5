"""Keeping a daemon where its clients look for it: every second its paths are checked.

What was removed or replaced is made anew (see `listening/repair.py`), and the workers accept from
the sockets that there are then. Called in the master.
"""

import logging
from collections.abc import Callable

from cpanbridge.supervisor.listening.repair import SECONDS, Repair
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.processes.spawner import Spawner
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")


class PathWatch:
    """One master's. `state` tells the daemon's state, as `cpanbridged status` shows it.

    `on_change` is called when the sockets have changed.
    """

    def __init__(
        self,
        sockets: Sockets,
        spawner: Spawner,
        state: Callable[[], str],
        on_change: Callable[[], None],
    ) -> None:
        self._sockets = sockets
        self._spawner = spawner
        self._state = state
        self._on_change = on_change
        self._untold = False  # workers have not been told of a change yet
        self.repair = Repair(sockets)

    def check(self) -> None:
        """Check all paths now, and from now on every second."""
        # Else there is nothing to repair any more, or another master may be responsible.
        if self._state() not in ("stopping", "upgrading", "restarting"):
            self._check()
        self._spawner.loop.after(SECONDS, self.check)

    def _check(self) -> None:
        if self.repair.check():
            self._on_change()
            self._tell_workers()
        elif self._untold:
            self._tell_workers()

    def generation_serves(self) -> None:
        """Another generation serves, whose workers may have other sockets than are to be served."""
        if self._spawner.shared.header.listener_changes or self._sockets.former:
            self._tell_workers()

    def _tell_workers(self) -> None:
        try:
            self._spawner.have_accepted(self._sockets.accepting)
            self._untold = False
        except OSError as error:
            if not self._untold:
                LOGGER.error("Workers cannot be told where to accept: %s", explain(error))
            self._untold = True
