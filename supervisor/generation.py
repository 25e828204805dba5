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

from cpanbridge.supervisor import logs, notify
from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.listener import Listener
from cpanbridge.supervisor.logs import LogSettings
from cpanbridge.supervisor.loop import Loop
from cpanbridge.supervisor.place import NOBODYS, Mains, Place
from cpanbridge.supervisor.shared import Shared

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


class Company:
    """What all workers of a master have in common."""

    def __init__(self, loop: Loop, shared: Shared, bells: Sequence[Bells], mains: Mains) -> None:
        self.loop = loop
        self.shared = shared
        self.bells = bells
        self.mains = mains
        # Workers hold the read end only, so it ends when the master does, however that happens.
        self.lifeline, self.life = os.pipe()
        # Rung by a worker that asks to be retired.
        self.plea = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.inherited_life: list[int] = []  # the same of masters before this one

    def fork(self, name: str, generation: Generation, main: Callable[[Place], None]) -> int:
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

    def _become(self, name: str, generation: Generation, main: Callable[[Place], None]) -> NoReturn:
        """Called in the child: let go of what is the master's alone, and never come back."""
        try:
            plea = os.dup(self.plea)
            self.loop.let_go()
            for life in (self.life, *self.inherited_life):
                os.close(life)
            logs.configure(generation.log)
            for variable in notify.VARIABLES:
                os.environ.pop(variable, None)
            main(
                Place(
                    slot=NOBODYS,
                    generation=generation.number,
                    settings=generation.settings,
                    shared=self.shared,
                    bells=self.bells,
                    listeners=[listener.socket for listener in generation.listeners],
                    lent=any(listener.lent for listener in generation.listeners),
                    lifeline=self.lifeline,
                    report=NOBODYS,
                    opening=generation.opening,
                    plea=plea,
                    reopen_logs=logs.reopen,
                )
            )
        except BaseException:
            LOGGER.exception("%s cannot begin", name)
        finally:
            os._exit(1)
