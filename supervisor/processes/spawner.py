"""Forking the processes of a daemon, and what all of them have in common.

A process that the master forks, a worker or a template, receives its part of the spawner and of its
generation as a `WorkerContext`. Called in the master, but where it says otherwise.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.listener_box import ListenerBox
from cpanbridge.supervisor.memory.wakeups import Wakeups, wake_main_threads
from cpanbridge.supervisor.processes.context import UNASSIGNED, Mains, WorkerContext
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.log_process import LogProcess
from cpanbridge.supervisor.processes.oom_kills import OomKills
from cpanbridge.supervisor.processes.unattended_queues import UnattendedQueues
from cpanbridge.supervisor.system import logs, sd_notify
from cpanbridge.supervisor.system.event_loop import Loop, Timer
from cpanbridge.supervisor.system.log_text import describe_exit

LOGGER = logging.getLogger("cpanbridge.master")

# A process that takes longer to boot hangs: in the import of a module, most likely.
BOOT_SECONDS = 60.0
DUMP_SECONDS = 0.5  # for it to write to the log where it hangs


class HeldPool(msgspec.Struct):
    """What a pool consists of, as descriptors and numbers that another process can use."""

    shared: int  # the shared memory
    wakeups: list[Wakeups]  # of each slot
    life: list[int]  # the write ends of the workers' lifelines
    occupied: list[int]  # slots in use
    listener_box: ListenerBox

    def descriptors(self) -> list[int]:
        """The descriptors that the other process must inherit."""
        wakeups = (each for slot in self.wakeups for each in slot)
        return [self.shared, *self.life, *wakeups, *self.listener_box]


@dataclass(eq=False)
class Spawner:
    """Forks the processes of one master."""

    loop: Loop
    shared: Shared
    wakeups: Sequence[Wakeups]
    mains: Mains

    def __post_init__(self) -> None:
        # Workers have the read end only, so it reads end of file when the master is gone, however
        # the master ended.
        self.lifeline, self.life = os.pipe()
        # A worker that asks for something writes to it.
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # The write ends of earlier masters' lifelines, while workers of theirs are there.
        self.inherited_life: list[int] = []
        self.log_process = LogProcess(self.loop)
        self.log_process.follow()
        self.oom_kills = OomKills(self.loop)
        self.unattended = UnattendedQueues(self.loop, self.shared, self.wakeups)
        self.listener_box = ListenerBox.create()

    def fork(self, name: str, generation: Generation, main: Callable[[WorkerContext], None]) -> int:
        """Fork a process of a generation, which runs `main` and nothing else; its pid.

        Its context has no slot and no report yet. Raises OSError.
        """
        if generation.log.log_format == "json":
            self.log_process.open()
        # A signal between the fork and the child's own handlers would be written to the master's
        # wake-up descriptor.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become(name, generation, main)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid

    def held(self, occupied: list[int]) -> HeldPool:
        """What a master that takes over needs."""
        life = [self.life, *self.inherited_life]
        return HeldPool(self.shared.fd, list(self.wakeups), life, occupied, self.listener_box)

    def have_accepted(self, sockets: Sequence[socket.socket]) -> None:
        """Have all workers accept clients from these, and from no others. Raises OSError."""
        self.listener_box.replace(sockets)
        self.shared.header.listener_changes += 1
        wake_main_threads(self.shared, self.wakeups)

    def inherit(self, held: HeldPool) -> None:
        """Go on with what another master has made."""
        self.inherited_life = list(held.life)
        for descriptor in self.listener_box:
            os.close(descriptor)
        self.listener_box = held.listener_box

    def _become(
        self, name: str, generation: Generation, main: Callable[[WorkerContext], None]
    ) -> NoReturn:
        """Called in the child: close what is the master's alone, and never return."""
        try:
            wake_master = os.dup(self.wakeup)
            self.loop.let_go()
            for life in (self.life, *self.inherited_life):
                os.close(life)
            logs.configure(generation.log)
            self.log_process.let_go()
            for variable in sd_notify.VARIABLES:
                os.environ.pop(variable, None)
            main(
                WorkerContext(
                    slot=UNASSIGNED,
                    generation=generation.number,
                    settings=generation.settings,
                    shared=self.shared,
                    wakeups=self.wakeups,
                    listeners=[listener.socket for listener in generation.listeners],
                    lent=any(listener.lent for listener in generation.listeners),
                    lifeline=self.lifeline,
                    report=UNASSIGNED,
                    opening=generation.opening,
                    wake_master=wake_master,
                    reopen_logs=logs.reopen,
                    listener_box=self.listener_box,
                )
            )
        except BaseException:
            LOGGER.exception("%s cannot begin", name)
        finally:
            os._exit(1)


class Process:
    """A worker or a template, or none yet. It has one timer, for what is to happen to it next."""

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._timer = Timer(lambda: None)
        self._overdue = False  # it was not ready after BOOT_SECONDS
        self.importing = ""  # the module that it imports, as errors name it, while it boots
        self._killed = False  # by this master
        self.pid = 0  # 0: no process

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if there is a process."""
        if self.pid:
            os.kill(self.pid, number)  # the pid stays its own until the master waits for it

    def kill(self) -> None:
        """End it at once, if there is a process. What it ran is lost."""
        self._killed = True
        self.signal(signal.SIGKILL)

    def describe_end(self, status: int) -> str:
        """How it ended, in words."""
        if self._overdue:
            what = f"{self.importing}: not imported" if self.importing else "not ready"
            return f"{what} after {BOOT_SECONDS:g} s; the log shows what it was at"
        how = describe_exit(status)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not self._killed:
            explanation = self._spawner.oom_kills.explain()
            how = f"{how} {explanation}" if explanation is not None else how
        return f"{self.importing}: its import ended the process: {how}" if self.importing else how

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` in so many seconds, in place of what was to happen."""
        self._timer.cancel()
        self._timer = self._spawner.loop.after(seconds, action)

    def _started(self, pid: int) -> None:
        """From now on it boots."""
        self.pid, self.importing, self._killed = pid, "", False
        self.after(BOOT_SECONDS, self._boot_hangs)

    def _boot_hangs(self) -> None:
        self._overdue = True
        self.signal(signal.SIGUSR2)  # it writes to the log where it hangs, see workers/boot.py
        self.after(DUMP_SECONDS, self.kill)
