"""The master process: fork the workers, watch them, replace them, stop them.

It is single-threaded, so that forking is safe. It runs no module code and reads no client bytes. It
waits in one place, the event loop. A signal NAME is handled by the method
`handle_name`. Which workers there should be is the worker pool's business.
"""

import gc
import logging
import os
import signal
from functools import partial

import setproctitle

from cpanbridge.supervisor.config import KILL_MARGIN, Load, Loaded
from cpanbridge.supervisor.lifecycle.handover import Handover, NextMaster
from cpanbridge.supervisor.lifecycle.path_watch import PathWatch
from cpanbridge.supervisor.lifecycle.reload import OnDone, Reloader
from cpanbridge.supervisor.lifecycle.upgrade import Inherited, Predecessor
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.memory.layout import Shared, slot_capacity
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.monitor.monitor import Monitor
from cpanbridge.supervisor.processes.context import Mains
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.retirement import Retirement
from cpanbridge.supervisor.processes.watchdog import Watchdog
from cpanbridge.supervisor.reports.answers import Answers
from cpanbridge.supervisor.system import logs
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.sd_notify import ServiceManager
from cpanbridge.supervisor.system.signals import Signals
from cpanbridge.supervisor.version import __version__
from cpanbridge.supervisor.wording import count_of

LOGGER = logging.getLogger("cpanbridge.master")


class Master:
    """The master of one daemon, from its first fork to its last wait.

    `on_ready` is called once: with None when all workers are ready, or with the reason why the
    daemon does not start. The new master of an upgrade has `inherited` a daemon that is ready.
    """

    def __init__(
        self,
        load: Load,
        loaded: Loaded,
        sockets: Sockets,
        mains: Mains,
        on_ready: OnDone,
        inherited: Inherited | None = None,
    ) -> None:
        settings = loaded.settings
        self._sockets = sockets
        self._on_ready = on_ready
        if inherited is None or inherited.shared is None:
            capacity = slot_capacity(settings.worker_count)
            shared = Shared.create(capacity, settings.limits, used=settings.worker_count)
            wakeups = [Wakeups.create() for _ in shared.slots]
        else:
            assert inherited.estate.pool is not None
            shared, wakeups = inherited.shared, inherited.estate.pool.wakeups
        number = 1 if inherited is None else inherited.estate.generation
        self._loop = loop = Loop()
        self._pool = pool = WorkerPool(self, loop, shared, wakeups, mains)
        self._reloader = Reloader(load, loaded, sockets, pool, number, self._follow_generation)
        retirement = Retirement(pool, self.handle_term)
        # There is no memory for two: the replacement starts when the worker has ended.
        retire = partial(retirement.retire_soon, replace_first=False)
        self._monitor = Monitor(loop, shared, wakeups, settings.limits, sockets.accepting, retire)
        self._watchdog = Watchdog(pool, retirement)
        self._service_manager = ServiceManager(loop, silent=inherited is not None)
        watched = sockets, pool.spawner, lambda: self.state
        self._paths = PathWatch(*watched, on_change=self._follow_sockets)
        self._control = Answers(self, self._reloader, pool, shared, self._paths.repair).server(loop)
        self.handover = Handover(
            pool, self._reloader, sockets, self._control, self._service_manager
        )
        self._predecessor: Predecessor | None = None  # until the workers of this master serve
        if inherited is not None:
            events = self._taken_over, self._service_manager.speak
            self._predecessor = Predecessor(inherited, pool, self._reloader, sockets, *events)
        self._signals = Signals(loop, self._handle)
        self._started = inherited is not None
        self._reload_when_started = False
        self._stopping = False
        self._exit_status = 0

    def run(self) -> int:
        """Be the master until the daemon has stopped. Returns the exit status, 0 or 1."""
        self._follow_generation()
        self._signals.catch()
        self._service_manager.watch_dog()
        self._paths.check()
        gc.freeze()  # workers share what exists now, as long as the collector does not write to it
        if self._predecessor is not None:
            self._reloader.begin(self._replaced_old_workers)
        else:
            self._sockets.answer(self._control.listen)
            self._pool.spawn(self._reloader.generation)
        while not (self.handover.complete or (self._stopping and self._pool.is_gone())):
            self._loop.turn()
        self._signals.ignore()
        if not self.handover.complete:
            LOGGER.info("Stopped")
        self._pool.spawner.log_process.close(wait=not self.handover.complete)
        return self._exit_status

    # -- signals --

    def _handle(self, number: int) -> None:
        if not self.handover.defers(number):
            name = signal.Signals(number).name.removeprefix("SIG").lower()
            getattr(self, f"handle_{name}")()

    def handle_term(self) -> None:
        """Stop gracefully: accept no new client, and let running requests finish."""
        if not self._stopping:
            seconds = self._graceful_timeout
            LOGGER.info("Stopping: running requests may take %g s", seconds)
            self._stop(seconds)

    handle_int = handle_term  # Ctrl-C on `cpanbridged run`

    def handle_quit(self) -> None:
        """Stop at once."""
        LOGGER.info("Stopping at once")
        self._stop(None)

    def handle_chld(self) -> None:
        """Some children have ended. Pending signals of one kind merge, so ask until there is none.

        Not only workers: a subreaper, or process 1 of a container, inherits what they leave behind.
        """
        while True:
            try:
                pid, status = os.waitpid(self.handover.children, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for ended in (self.handover.ended, self._pool.ended):
                self._loop.attempt(partial(ended, pid, status))

    def handle_hup(self) -> None:
        """Reload: a new generation with the configuration and the modules as they are now."""
        self.reload(lambda _: None)

    def handle_usr1(self) -> str | None:
        """Continue in new log files of the same names. Returns why that cannot be, or None."""
        try:
            logs.reopen()
        except logs.LogError as error:
            LOGGER.error("The log stays where it is: %s", error)
            return str(error)
        LOGGER.info("Logs reopened")
        self._pool.reopen_logs()
        return None

    def handle_usr2(self) -> None:
        """Upgrade: hand over to a new master, of the code that is on disk now."""
        self.hand_over(NextMaster(), lambda _: None)

    def handle_ttin(self) -> None:
        """One worker more, until the next reload."""
        if self._pool.add(self._reloader.generation):
            LOGGER.info("1 worker more: %d", self._reloader.generation.wanted)
        else:
            LOGGER.warning("No worker more: there is no room for it")

    def handle_ttou(self) -> None:
        """One worker fewer, until the next reload."""
        if self._pool.remove(self._reloader.generation):
            LOGGER.info("1 worker fewer: %d", self._reloader.generation.wanted)
        else:
            LOGGER.warning("No worker fewer: the last worker stays")

    def stop(self) -> None:
        """Stop gracefully, as TERM does; while another master takes over, that one stops."""
        self._handle(signal.SIGTERM)

    # -- called by the worker pool --

    def generation_ready(self, generation: Generation) -> None:
        """All workers have booted: the daemon is ready, or a reload can be completed."""
        if self._stopping:
            return
        if self._predecessor is not None and self._predecessor.pending:
            self._predecessor.ready()
        elif self._started:
            self._reloader.ready(generation)
        else:
            self._pool.put_in_service(generation)
            self._started = True
            self._monitor.start()
            self._watchdog.check()
            LOGGER.info(
                "cpanbridged %s ready: pid %d, %s, listening on %s",
                *(__version__, os.getpid(), count_of(generation.wanted, "worker")),
                ", ".join(listener.path for listener in generation.listeners),
            )
            self._on_ready(None)
            self._tell_ready()
            if self._reload_when_started:
                self.handle_hup()

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker cannot boot: a reload fails, or the daemon does not start."""
        if self._started:
            self._reloader.failed(generation, reason)
        elif not self._stopping:
            self._exit_status = 1
            self._stop(None, reason)

    # -- reloading, stopping --

    def reload(self, on_done: OnDone) -> None:
        """Change over to the configuration as it is now; `on_done` is called once, see Reloader."""
        taking_over = self._predecessor is not None and self._predecessor.pending
        if self._stopping:
            self._reloader.refuse(on_done, "the daemon is stopping")
        elif self.handover.successor or taking_over:
            self._service_manager.reloading()  # `systemctl reload` waits until it was, and is over
            self._reloader.refuse(partial(self._reloaded, on_done), self.handover.under_way)
        elif not self._started:
            self._reload_when_started = True
            on_done("the daemon is still starting; it reloads when it has started")
        else:
            self._service_manager.reloading()
            self._reloader.begin(partial(self._reloaded, on_done))

    def _reloaded(self, on_done: OnDone, reason: str | None) -> None:
        self._tell_ready(f"Not reloaded: {reason}" if reason is not None else None)
        on_done(reason)

    def _tell_ready(self, failure: str | None = None) -> None:
        """Tell the service manager that the daemon serves, and what has failed."""
        generation = self._reloader.generation
        serves = (
            f"Serving with {count_of(generation.wanted, 'worker')}, generation {generation.number}"
        )
        if not self._stopping:  # or the service manager would take the stop for over
            self._service_manager.ready(failure or serves)

    def _follow_generation(self) -> None:
        """Another generation serves: its configuration holds."""
        loaded = self._reloader.loaded
        self._monitor.limits = loaded.settings.limits
        self._paths.generation_serves()
        self._follow_sockets()
        setproctitle.setproctitle(f"cpanbridged: master [{loaded.source}]")

    def _follow_sockets(self) -> None:
        self._monitor.listeners = self._sockets.accepting

    def _stop(self, seconds: float | None, reason: str = "told to stop") -> None:
        if not self._started and not self._stopping:
            self._on_ready(reason)
        if not self._stopping:
            self._stopping = True
            self._service_manager.stopping((seconds or 0.0) + KILL_MARGIN)
            self._reloader.give_up("the daemon is stopping")
            self.handover.give_up("the daemon is stopping")
            self._sockets.close()
        self._pool.stop(seconds)

    @property
    def _graceful_timeout(self) -> float:
        return self._reloader.loaded.settings.limits.graceful_timeout

    # -- upgrading --

    def hand_over(self, new: NextMaster, on_done: OnDone) -> None:
        """Hand over to a new master; `on_done` is called once: with None when it has taken over."""
        reason = self._cannot_hand_over()
        if reason is None:
            self.handover.begin(new, partial(self._handed_over, new, on_done))
            return
        LOGGER.error("%s, nothing has changed: %s", new.failure, reason)
        if not self._stopping:
            self._service_manager.status(f"{new.failure}: {reason}")
        on_done(reason)

    def _handed_over(self, new: NextMaster, on_done: OnDone, reason: str | None) -> None:
        if reason is not None:
            self._tell_ready(f"{new.failure}: {reason}")
        on_done(reason)

    def _cannot_hand_over(self) -> str | None:
        if self._stopping:
            return "the daemon is stopping"
        if self.handover.successor:
            return self.handover.under_way
        if not self._started or self._reloader.coming is not None:
            return f"the daemon is {self.state}"
        if os.getpid() == 1:
            return "process 1 of a container cannot be replaced; restart the container"
        return None

    def _taken_over(self) -> None:
        """The daemon is this master's, with the workers of the old one."""
        self._sockets.answer(self._control.listen)
        self._monitor.start()
        self._watchdog.check()

    def _replaced_old_workers(self, reason: str | None) -> None:
        """The reload by which a new master replaces the old workers is over."""
        assert self._predecessor is not None
        predecessor, self._predecessor = self._predecessor, None
        if reason is None:
            self._tell_ready()
        elif predecessor.pending:
            predecessor.refuse(reason)
            self._exit_status = 1
            self._stop(None)
        elif not self._stopping:
            seconds = self._graceful_timeout
            LOGGER.error(
                "Stopping, because the old master is dead and this one cannot take its place; "
                "running requests may take %g s: %s",
                seconds,
                reason,
            )
            self._exit_status = 1
            self._stop(seconds)

    # -- state --

    @property
    def state(self) -> str:
        """The daemon's state in a word, as `cpanbridged status` shows it."""
        if self._stopping:
            return "stopping"
        if not self._started:
            return "starting"
        if self.handover.successor:
            return "restarting" if self.handover.restarts else "upgrading"
        if self._predecessor is not None:
            return "upgrading"
        if self._reloader.coming is not None:
            return "reloading"
        serves = any(each.serves for each in self._pool.workers)
        return "running" if serves else "not serving"
