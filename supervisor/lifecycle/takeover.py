"""Handing a daemon over to another master, and taking it over: both sides of an upgrade.

What the two masters say to each other is in `upgrade.py`. Here is what each does with its own parts
meanwhile: the old one keeps to its slots, and stands still from when the new one is ready; the new
one serves nothing until the old one does. When the old one dies, the new one is the master at once,
with the old workers, whether or not its own have booted. Called in the master.
"""

import logging
import os
import signal
from collections.abc import Callable, Sequence

from cpanbridge.supervisor.control.server import ControlServer
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.lifecycle.reload import Reloader
from cpanbridge.supervisor.lifecycle.upgrade import Estate, Inherited, Predecessor, Successor
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.log_text import describe_exit
from cpanbridge.supervisor.system.sd_notify import ServiceManager
from cpanbridge.supervisor.version import __version__

LOGGER = logging.getLogger("cpanbridge.master")

Tell = Callable[[str | None], None]


class Takeover:
    """One master's place in the row of masters.

    `left` is whether another one has taken over, and this one is to leave everything to it.
    """

    def __init__(
        self,
        loop: Loop,
        shared: Shared,
        wakeups: Sequence[Wakeups],
        sockets: Sockets,
        pool: WorkerPool,
        reloader: Reloader,
        control: ControlServer,
        notifier: ServiceManager,
    ) -> None:
        self._loop = loop
        self._shared = shared
        self._wakeups = wakeups
        self._sockets = sockets
        self._pool = pool
        self._reloader = reloader
        self._control = control
        self._notifier = notifier
        self._successor: Successor | None = None
        self._predecessor: Predecessor | None = None
        self._on_taken: Callable[[], None] = lambda: None
        self._put_off: list[int] = []
        self._booted = False
        self.left = False

    @property
    def successor(self) -> int:
        """The pid of the master that is to take over; 0: there is none."""
        return self._successor.pid if self._successor is not None else 0

    @property
    def expected(self) -> bool:
        """Whether this is a new master, which has not taken over yet."""
        return self._predecessor is not None

    # -- in the old master --

    def begin(self, tell: Tell) -> None:
        """Hand over to a new master; `tell` is called once: with None when it has taken over."""
        self._pool.confined = True
        estate = Estate(
            self._shared.fd,
            [list(each) for each in self._wakeups],
            self._pool.life,
            self._sockets.held(),
            self._reloader.generation.number,
            self._pool.occupied,
        )

        def failed(reason: str) -> None:
            self._stay()
            LOGGER.error("Not upgraded, nothing has changed: %s", reason)
            tell(reason)

        def taken(pid: int) -> None:
            LOGGER.info("Handed over to pid %d", pid)
            tell(None)
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

    def puts_off(self, number: int) -> bool:
        """Whether a signal has come at the one moment when nobody can act on it.

        The new master gets it, or this one once more.
        """
        if not self._pool.standing_still or number == signal.SIGCHLD:
            return False
        self._put_off.append(number)
        return True

    @property
    def whom_to_wait_for(self) -> int:
        """For waitpid(2): while another master takes over, the workers are its business."""
        return self.successor if self._pool.standing_still else -1

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was not the new master."""
        if self._successor is not None and pid == self._successor.pid:
            self._successor.ended(describe_exit(status))

    def _stand_still(self) -> None:
        """The new master is ready: do nothing more that it would not know of."""
        self._pool.standing_still = True
        self._control.stop_listening()
        assert self._successor is not None
        self._successor.hand_over()

    def _stay(self) -> None:
        """There is no new master after all."""
        self._successor = None
        self._pool.end_orphans(self._reloader.generation)
        self._pool.confined = False
        if self._pool.standing_still:
            self._pool.standing_still = False
            self.watch_control()
            try:
                self._sockets.take_over()  # the new master may have written its pid already
            except InstanceError as error:
                LOGGER.error("%s", error)
            put_off, self._put_off = self._put_off, []
            for number in (signal.SIGCHLD, *put_off):
                os.kill(os.getpid(), number)

    def _leave_to(self, pid: int) -> None:
        self._notifier.handed_over(pid)
        self._sockets.give_away()
        for number in self._put_off:
            os.kill(pid, number)
        self.left = True

    # -- in the new master --

    def will_inherit(self, inherited: Inherited, on_taken: Callable[[], None]) -> None:
        """This master is to take over, and calls `on_taken` when it has."""
        estate, generation = inherited.estate, self._reloader.generation
        generation.put_in_service()
        self._pool.will_inherit(generation, estate.occupied, estate.life)
        self._on_taken = on_taken
        self._predecessor = Predecessor(
            self._loop, inherited.end, self._take_over, self._notifier.speak
        )

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

        None of them that dies before the new generation serves is replaced: that boots already.
        """
        coming = self._reloader.coming
        if self._predecessor is None or coming is None:
            return  # it has been refused meanwhile
        try:
            self._sockets.take_over()
        except InstanceError as error:  # no disk space: whoever looks for the pid must find it
            self._sockets.give_away()
            self._reloader.give_up(str(error))
            return
        predecessor, self._predecessor = self._predecessor, None
        predecessor.taken()
        self._pool.inherit(self._reloader.generation)
        self.watch_control()
        LOGGER.info("cpanbridged %s takes over: pid %d", __version__, os.getpid())
        self._on_taken()
        if self._booted:
            self._reloader.ready(coming)

    # -- in both --

    def watch_control(self) -> None:
        """Answer at the control socket from now on, wherever a reload moves it."""
        if self._sockets.control is not None:
            self._control.listen(self._sockets.control)
        self._sockets.control_moved = self._control.listen
