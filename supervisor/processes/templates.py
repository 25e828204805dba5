"""Templates: processes that have imported a generation's modules, and fork its workers.

Workers share with their template what it has imported, until they write to it: a heavy module is in
memory once. The master imports no module, and a reload imports them anew, in a template of the new
generation. A worker that is needed later is forked from the template too, with the modules as they
were.

A worker is the master's child all the same. The template forks twice, and the process between the
two ends at once; then the kernel makes the worker a child of the nearest subreaper among its
ancestors, which is the master (PR_SET_CHILD_SUBREAPER).

A fork cannot share everything. When a template finds that the import of a module has started a
thread or opened a file, another template replaces it and does not import that module: each worker
imports it by itself. A template stays as long as its generation. When it dies before, workers of
this generation import everything by themselves. Called in the master.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable
from enum import Enum
from functools import partial

from cpanbridge.supervisor.processes.context import (
    TemplateContext,
    WorkerContext,
    receive_imports,
    send_command,
)
from cpanbridge.supervisor.processes.generation import Generation, Stage
from cpanbridge.supervisor.processes.spawner import BOOT_SECONDS, DUMP_SECONDS, Spawner
from cpanbridge.supervisor.system import process_tree
from cpanbridge.supervisor.system.event_loop import Timer
from cpanbridge.supervisor.system.log_text import describe_exit

LOGGER = logging.getLogger("cpanbridge.master")

MOST_ATTEMPTS = 3  # a module may turn out to be unfit only when another one is kept out


class _Stage(Enum):
    IMPORTS = "imports"
    FORKS = "forks"
    OVER = "ends"


class Template:
    """One generation's template.

    `on_ready` is called when workers can be forked: by the template, or by the master where there
    is no use for one. `on_failed` is called with the reason when a module cannot be imported.
    """

    def __init__(
        self,
        spawner: Spawner,
        generation: Generation,
        on_ready: Callable[[], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._spawner = spawner
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._commands: socket.socket | None = None
        self._stage = _Stage.IMPORTS
        self._attempts = 0
        self._kept_out: set[str] = set()  # modules
        self._timer: Timer | None = None
        self._overdue = False
        self._again = False  # it is to be forked anew, without the modules that are kept out
        self.generation = generation
        self.pid = 0  # 0: no process

    @property
    def imports(self) -> bool:
        """Whether it still imports the modules."""
        return self._stage is _Stage.IMPORTS

    @property
    def state(self) -> str:
        """What it does, in a word."""
        return self._stage.value

    @property
    def forks(self) -> bool:
        """Whether it can fork workers."""
        return self._stage is _Stage.FORKS

    def start(self) -> None:
        """Begin. Called once."""
        try:
            process_tree.inherit_orphans()
            self._fork()
        except OSError as error:
            self._do_without(f"it cannot be started: {error.strerror}")

    def command(self, slot: int, report: int) -> None:
        """Have it fork a worker into a slot. Raises OSError."""
        if self._commands is None:
            raise BrokenPipeError
        send_command(self._commands, slot, report)

    def end(self) -> None:
        """Fork no worker from it any more. It has nothing to finish."""
        self._stage = _Stage.OVER
        self._cancel_timer()
        self._close_commands()
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it has a process."""
        if self.pid:
            os.kill(self.pid, number)  # the pid stays its own until this process waits for it

    def ended(self, status: int) -> None:
        """It has ended and was waited for."""
        pid, self.pid = self.pid, 0
        if self._commands is not None:
            self._receive()  # its last message may not have been read yet
        self._close_commands()
        self._cancel_timer()
        how = describe_exit(status)
        if self._overdue:
            how = f"not ready after {BOOT_SECONDS:g} s; the log shows what it was at"
        if self.forks:
            self._stage = _Stage.OVER
            LOGGER.error(
                "The template of generation %d (pid %d) died: %s; until the next reload, each new "
                "worker imports its modules by itself",
                self.generation.number,
                pid,
                how,
            )
        elif self.imports and self._again:
            self._begin_anew()
        elif self.imports:
            self._stage = _Stage.OVER
            LOGGER.error("The template (pid %d) died at boot: %s", pid, how)
            self._on_failed(f"the template died at boot: {how}")

    def _fork(self) -> None:
        self._attempts += 1
        self._again = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def main(context: WorkerContext) -> None:
            ours.close()
            self._spawner.mains.template(TemplateContext(context, theirs, tuple(self._kept_out)))

        try:
            self.pid = self._spawner.fork("The template", self.generation, main)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._commands = ours
        self._spawner.loop.watch(ours.fileno(), self._receive)
        self._timer = self._spawner.loop.after(BOOT_SECONDS, self._hangs)

    def _receive(self) -> None:
        assert self._commands is not None
        try:
            imports = receive_imports(self._commands)
        except BlockingIOError:
            return
        if imports is None or not self.imports:
            self._close_commands()  # SIGCHLD tells how it ended
            return
        self._cancel_timer()
        if imports.error is not None:
            LOGGER.error("Generation %d cannot start: %s", self.generation.number, imports.error)
            self.end()
            self._on_failed(imports.error)
        elif imports.unfit:
            for name, reason in imports.unfit.items():
                LOGGER.info("Module %s is imported by each worker for itself: %s", name, reason)
            self._kept_out.update(imports.unfit)
            self._again = True
            self._close_commands()
            self.signal(signal.SIGKILL)
        elif not imports.shared:
            self._do_without(None)
        else:
            self._stage = _Stage.FORKS
            LOGGER.info(
                "Template ready (pid %d): %d modules imported for all workers",
                self.pid,
                imports.shared,
            )
            self._on_ready()

    def _begin_anew(self) -> None:
        if self._attempts == MOST_ATTEMPTS:
            self._do_without(f"modules were found unfit {MOST_ATTEMPTS} times")
            return
        try:
            self._fork()
        except OSError as error:
            self._do_without(f"it cannot be started: {error.strerror}")

    def _do_without(self, reason: str | None) -> None:
        """Have each worker import for itself."""
        if reason is not None:
            LOGGER.warning(
                "Generation %d has no template, each worker imports for itself: %s",
                self.generation.number,
                reason,
            )
        self.end()
        # Not from within `start`: its caller has not returned to the loop yet.
        self._spawner.loop.after(0.0, self._on_ready)

    def _hangs(self) -> None:
        self._overdue = True
        self.signal(signal.SIGUSR2)  # it writes to the log where it hangs, see workers/boot.py
        self._timer = self._spawner.loop.after(DUMP_SECONDS, partial(self.signal, signal.SIGKILL))

    def _close_commands(self) -> None:
        if self._commands is not None:
            self._spawner.loop.forget(self._commands.fileno())
            self._commands.close()
            self._commands = None

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Templates:
    """All templates of a master: one for each generation that has modules to share."""

    def __init__(
        self,
        spawner: Spawner,
        on_ready: Callable[[Generation], None],
        on_failed: Callable[[Generation, str], None],
    ) -> None:
        self._spawner = spawner
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._all: list[Template] = []

    @property
    def alive(self) -> list[Template]:
        """Those that have a process."""
        return [template for template in self._all if template.pid]

    def of(self, generation: Generation) -> Template | None:
        """A generation's template, whatever its stage."""
        return next((each for each in self._all if each.generation is generation), None)

    def must_be_awaited(self, generation: Generation) -> bool:
        """Whether no worker of a generation may be forked yet. Starts its template if need be."""
        template = self.of(generation)
        if (
            template is None
            and generation.stage is Stage.BOOTS
            and generation.settings.preloads_any
        ):
            template = Template(
                self._spawner,
                generation,
                partial(self._on_ready, generation),
                partial(self._on_failed, generation),
            )
            self._all.append(template)
            template.start()
            return True
        return template is not None and template.imports

    def end(self, generation: Generation) -> None:
        """A generation needs no more workers."""
        template = self.of(generation)
        if template is not None:
            template.end()
            self._forget_gone()

    def end_all(self) -> None:
        """No generation needs any more workers."""
        for template in self._all:
            template.end()

    def signal(self, number: signal.Signals) -> None:
        """Send all templates a signal."""
        for template in self._all:
            template.signal(number)

    def ended(self, pid: int, status: int) -> bool:
        """A child has ended; whether it was a template."""
        for template in self._all:
            if template.pid == pid:
                template.ended(status)
                self._forget_gone()
                return True
        return False

    def _forget_gone(self) -> None:
        over = (each for each in self._all if each.generation.stage is Stage.OVER)
        gone = [each for each in over if not each.pid]
        self._all = [each for each in self._all if each not in gone]
