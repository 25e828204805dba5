"""What workers have in common: all of one generation, and all of one master.

A process that the master forks, a worker or a template, gets its part of both as a `Place`. Called
in the master, but where it says otherwise.
"""

import logging
import os
import signal
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NoReturn

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.listening.listener import Listener
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.context import UNASSIGNED, Mains, WorkerContext
from cpanbridge.supervisor.system import logs, sd_notify
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.logs import LogSettings

LOGGER = logging.getLogger("cpanbridge.master")

# A module that takes longer to import is taken to hang.
BOOT_SECONDS = 60.0
DUMP_SECONDS = 0.5  # to write where it hangs


class Stage(Enum):
    """How far a generation has come."""

    BOOTS = "boots"
    SERVES = "serves"
    OVER = "over"  # another one has taken over, or it has never been wanted


class Generation:
    """What all workers of one start or reload have in common."""

    def __init__(
        self, number: int, settings: Settings, listeners: Sequence[Listener], log: LogSettings
    ) -> None:
        self.number = number
        self.settings = settings
        self.listeners = listeners
        self.log = log
        self.wanted = settings.worker_count  # workers
        self.stage = Stage.BOOTS
        self.opening = os.eventfd(0, os.EFD_CLOEXEC)

    @property
    def in_service(self) -> bool:
        """Whether its workers may accept, and those that die are replaced."""
        return self.stage is Stage.SERVES

    def put_in_service(self) -> None:
        """Let its workers accept."""
        self.stage = Stage.SERVES
        os.eventfd_write(self.opening, 1)

    def close(self) -> None:
        """No worker belongs to it any more."""
        os.close(self.opening)


class Spawner:
    """What all workers of a master have in common."""

    def __init__(
        self, loop: Loop, shared: Shared, wakeups: Sequence[Wakeups], mains: Mains
    ) -> None:
        self.loop = loop
        self.shared = shared
        self.wakeups = wakeups
        self.mains = mains
        # Workers hold the read end only, so it ends when the master does, however that happens.
        self.lifeline, self.life = os.pipe()
        # Rung by a worker that asks to be retired.
        self.retirement_request = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.inherited_life: list[int] = []  # the same of masters before this one

    def fork(self, name: str, generation: Generation, main: Callable[[WorkerContext], None]) -> int:
        """Fork a process of a generation, which runs `main` and nothing else; its pid.

        Its place has no slot and no report yet. Raises OSError.
        """
        # A signal between the fork and the child's own handlers would be told to the master.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become(name, generation, main)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid

    def _become(
        self, name: str, generation: Generation, main: Callable[[WorkerContext], None]
    ) -> NoReturn:
        """Called in the child: let go of what is the master's alone, and never come back."""
        try:
            retirement_request = os.dup(self.retirement_request)
            self.loop.let_go()
            for life in (self.life, *self.inherited_life):
                os.close(life)
            logs.configure(generation.log)
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
                    retirement_request=retirement_request,
                    reopen_logs=logs.reopen,
                )
            )
        except BaseException:
            LOGGER.exception("%s cannot begin", name)
        finally:
            os._exit(1)
