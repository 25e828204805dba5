"""Handing a daemon over to a new master: what the old master does in an upgrade or a restart.

It serves on, but uses no further slot. In a restart it ends its workers when the new master is
ready. It stands still from then on until that has taken over, and then leaves everything to it.
When the new master fails before that, nothing has changed. Called in the old master.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from cpanbridge.supervisor.config import UPGRADE_VARIABLE
from cpanbridge.supervisor.control.server import ControlServer
from cpanbridge.supervisor.lifecycle.reload import OnDone, Reloader
from cpanbridge.supervisor.lifecycle.upgrade import Estate, First, Line, Message
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.memory.fields import COMMAND_RESTART
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system import logs
from cpanbridge.supervisor.system.event_loop import Timer
from cpanbridge.supervisor.system.log_text import describe_exit
from cpanbridge.supervisor.system.sd_notify import ServiceManager
from cpanbridge.supervisor.wording import explain_start

LOGGER = logging.getLogger("cpanbridge.master")

_END_PAUSE = 0.01
READY_SECONDS = 150.0  # more than a generation may take to boot: its template, then its workers
_END_SECONDS = 5.0  # for a new master to end after its `error`


class NextMaster(NamedTuple):
    """How a new master is started: as this one was, or else."""

    afresh: bool = False  # a restart: it makes its own shared memory and workers
    arguments: Sequence[str] = ()  # more flags; with a `folder`, these alone
    folder: str | None = None  # its working folder; None: that of this one

    @property
    def failure(self) -> str:
        """How it is called that there will be none."""
        return "Not restarted" if self.afresh else "Not upgraded"

    def command_line(self, command: str) -> list[str]:
        """For this interpreter and program; `command` is the subcommand that starts a daemon so."""
        own = sys.argv[1:]
        program = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(own)]]
        return [*program, *(own if self.folder is None else [command]), *self.arguments]


class Handover:
    """From this master to the next one, whenever an upgrade or a restart is requested.

    `complete` says that another master has taken over, so that this one must exit and leave
    everything as it is.
    """

    def __init__(
        self,
        pool: WorkerPool,
        reloader: Reloader,
        sockets: Sockets,
        control: ControlServer,
        service_manager: ServiceManager,
    ) -> None:
        self._pool = pool
        self._reloader = reloader
        self._sockets = sockets
        self._control = control
        self._service_manager = service_manager
        self._process: subprocess.Popen[bytes] | None = None  # the new master
        self._line: Line
        self._on_done: OnDone
        self._limit = Timer(lambda: None)  # to what the new master does next
        self._reason = ""  # why the new master cannot take over, as far as that is known
        self._standing_still = False
        self._ending_workers = False
        self._deferred: list[int] = []  # signals
        self.complete = False
        self._new = NextMaster()
        self.sockets: list[str] = []  # where the new master serves, once that has taken over

    @property
    def successor(self) -> int:
        """The pid of the new master; 0: there is none."""
        return self._process.pid if self._process is not None else 0

    def begin(self, new: NextMaster, on_done: OnDone) -> None:
        """Start a new master; `on_done` is called once: with None when it has taken over."""
        self._new, self._on_done, self._reason = new, on_done, ""
        self._pool.confined = True
        self._pool.spawner.shared.header.sockets_are_passed_on = 1
        pool = None if new.afresh else self._pool.held()
        number = 0 if new.afresh else self._reloader.generation.number
        settings = self._reloader.loaded.settings
        estate = Estate(
            pool,
            self._sockets.held(),
            number,
            settings.user,
            settings.group,
            logs.inherited_error(),
        )
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                self._process = subprocess.Popen(
                    new.command_line(self._pool.spawner.mains.command),
                    cwd=new.folder,
                    pass_fds=[theirs.fileno(), *estate.descriptors()],
                    env={**os.environ, UPGRADE_VARIABLE: str(theirs.fileno())},
                )
                end = socket.socket(fileno=ours.detach())
        except OSError as error:
            self._go_on(f"the new master cannot be started: {explain_start(error)}")
            return
        self._line = Line(self._pool.spawner.loop, end, self._receive)
        self._line.send(First(estate))
        self._kill_in(READY_SECONDS, f"the new master is not ready after {READY_SECONDS:g} s")
        what = "Restarting" if new.afresh else "Upgrading"
        LOGGER.info("%s: the new master is pid %d", what, self.successor)

    def give_up(self, reason: str) -> None:
        """Kill the new master, if there is one, and do not wait for its end: the daemon stops."""
        if self._process is not None and not self.complete:
            self._ending_workers = False  # it goes on to do so
            self._kill(reason)
            self._fail(reason)

    def defers(self, number: int) -> bool:
        """Whether a signal has come while this master stands still and must not act on it.

        The new master gets it, or this one once more.
        """
        if not self._standing_still or number == signal.SIGCHLD:
            return False
        self._deferred.append(number)
        return True

    @property
    def restarts(self) -> bool:
        """Whether what is under way is a restart."""
        return self._new.afresh

    @property
    def under_way(self) -> str:
        """What is under way, in words."""
        return f"{'a restart' if self.restarts else 'an upgrade'} is under way"

    @property
    def children(self) -> int:
        """Which children to wait for, as waitpid(2) takes it: -1 means all.

        While this master stands still, the workers are the new one's business.
        """
        return self.successor if self._standing_still else -1

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was not the new master.

        Only now there is no new master any more: it might still have written to its workers' slots.
        """
        if self._process is not None and pid == self._process.pid and not self.complete:
            self._process.returncode = 0
            self._fail(self._reason or f"the new master ended: {describe_exit(status)}")

    def _receive(self, message: Message | None) -> None:
        if message is None or self._process is None or self.complete or self._reason:
            return  # it has ended or is killed, as SIGCHLD tells
        if message.ready and self._new.afresh:
            self._end_workers()
        elif message.ready:
            self._stand_still()
        elif message.mine:
            self.sockets = message.sockets
            self._leave_to(message.mine)
        elif message.error is not None:
            self._reason = message.error
            self._kill_in(_END_SECONDS, message.error)

    def _end_workers(self) -> None:
        """Have the workers finish what they run. Who has not been accepted waits for the next."""
        self._limit.cancel()
        seconds = self._reloader.loaded.settings.limits.graceful_timeout
        LOGGER.info("Restarting: running requests may take %g s", seconds)
        self._ending_workers = True
        self._pool.stop(seconds, COMMAND_RESTART)
        self._wait_for_workers()

    def _wait_for_workers(self) -> None:
        if not self._ending_workers:
            return  # the new master has failed meanwhile
        if not self._pool.is_gone():
            self._pool.spawner.loop.after(_END_PAUSE, self._wait_for_workers)
            return
        self._kill_in(READY_SECONDS, "the new master does not take over")
        self._stand_still()

    def _stand_still(self) -> None:
        """The new master is ready: do nothing more that it would not know of."""
        self._standing_still = self._pool.standing_still = True
        self._control.stop_listening()
        self._line.send(Message(yours=True))

    def _leave_to(self, pid: int) -> None:
        self._limit.cancel()
        LOGGER.info("Handed over to pid %d", pid)
        self._on_done(None)
        self._service_manager.handed_over(pid)
        self._sockets.give_away()
        for number in self._deferred:
            os.kill(self.successor, number)  # not waited for yet, so the pid is still its own
        self.complete = True
        self._line.close()  # last: by that the new master knows that the old one is done

    def _kill_in(self, seconds: float, reason: str) -> None:
        self._limit.cancel()
        self._limit = self._pool.spawner.loop.after(seconds, partial(self._kill, reason))

    def _kill(self, reason: str) -> None:
        """The new master was not waited for yet, so the pid is still its own."""
        assert self._process is not None
        self._reason = reason
        os.kill(self._process.pid, signal.SIGKILL)

    def _fail(self, reason: str) -> None:
        self._limit.cancel()
        self._line.close()
        self._process = None
        self._go_on(reason)

    def _go_on(self, reason: str) -> None:
        """There is no new master after all."""
        self._end_workers_of_new_master()
        self._pool.confined = self._pool.standing_still = False
        self._pool.spawner.shared.header.sockets_are_passed_on = 0
        if self._ending_workers:
            self._ending_workers = False
            self._pool.resume(self._reloader.generation)
        if self._standing_still:
            self._standing_still = False
            self._sockets.answer(self._control.listen)
            try:
                self._sockets.take_over()  # the new master may have written its pid
            except InstanceError as error:
                LOGGER.error("%s", error)
            deferred, self._deferred = self._deferred, []
            for number in (signal.SIGCHLD, *deferred):
                os.kill(os.getpid(), number)
        LOGGER.error("%s, nothing has changed: %s", self._new.failure, reason)
        self._on_done(reason)

    def _end_workers_of_new_master(self) -> None:
        """They have never been in service. No slot of theirs is free until they have ended."""
        workers = [each for each in self._pool.workers if not each.generation and each.slot.pid]
        if workers:
            last = self._reloader.generation
            theirs = Generation(last.number + 1, last.settings, (), last.log)
            for worker in workers:
                worker.generation = theirs
            self._pool.inherit(theirs)
            self._pool.end(theirs)
