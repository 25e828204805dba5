"""Forking the processes of a daemon, and what all of them have in common.

A process that the master forks, a worker or a template, receives its part of the spawner and of its
generation as a `WorkerContext`. Called in the master, but where it says otherwise.
"""

import logging
import os
import signal
from collections.abc import Callable, Sequence
from typing import NoReturn

from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.context import UNASSIGNED, Mains, WorkerContext
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.system import logs, sd_notify
from cpanbridge.supervisor.system.event_loop import Loop

LOGGER = logging.getLogger("cpanbridge.master")

# A process that takes longer to boot hangs: in the import of a module, most likely.
BOOT_SECONDS = 60.0
DUMP_SECONDS = 0.5  # for it to write to the log where it hangs


class Spawner:
    """Forks the processes of one master."""

    def __init__(
        self, loop: Loop, shared: Shared, wakeups: Sequence[Wakeups], mains: Mains
    ) -> None:
        self.loop = loop
        self.shared = shared
        self.wakeups = wakeups
        self.mains = mains
        # Workers have the read end only, so it reads end of file when the master is gone, however
        # the master ended.
        self.lifeline, self.life = os.pipe()
        # A worker that asks to be retired writes to it.
        self.retirement_request = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # The write ends of earlier masters' lifelines, while workers of theirs are there.
        self.inherited_life: list[int] = []

    def fork(self, name: str, generation: Generation, main: Callable[[WorkerContext], None]) -> int:
        """Fork a process of a generation, which runs `main` and nothing else; its pid.

        Its context has no slot and no report yet. Raises OSError.
        """
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

    def close_inherited_life(self) -> None:
        """No worker of an earlier master is left."""
        while self.inherited_life:
            os.close(self.inherited_life.pop())

    def _become(
        self, name: str, generation: Generation, main: Callable[[WorkerContext], None]
    ) -> NoReturn:
        """Called in the child: close what is the master's alone, and never return."""
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
