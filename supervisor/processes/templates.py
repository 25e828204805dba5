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
from cpanbridge.supervisor.processes.spawner import Process, Spawner
from cpanbridge.supervisor.system import process_tree
from cpanbridge.supervisor.wording import count_of, explain_start

LOGGER = logging.getLogger("cpanbridge.master")

MOST_ATTEMPTS = 3  # a module may turn out to be unfit only when another one is kept out


class _Stage(Enum):
    IMPORTS = "imports"
    FORKS = "forks"
    OVER = "ends"


class Template(Process):
    """One generation's template.

    `on_ready` is called when workers can be forked: by the template, or by the master where there
    is no use for one. `on_failed` is called with the reason when a module cannot be imported.
    """

    def __init__(
        self,
        spawner: Spawner,
        generation: Generation,
        on_ready: Callable[[Generation], None],
        on_failed: Callable[[Generation, str], None],
    ) -> None:
        super().__init__(spawner)
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._commands: socket.socket | None = None
        self._stage = _Stage.IMPORTS
        self._attempts = 0
        self._kept_out: set[str] = set()  # modules
        self._again = False  # it is to be forked anew, without the modules that are kept out
        self.generation = generation

    @property
    def imports(self) -> bool:
        """Whether it still imports the modules."""
        return self._stage is _Stage.IMPORTS

    @property
    def forks(self) -> bool:
        """Whether it can fork workers."""
        return self._stage is _Stage.FORKS

    @property
    def state(self) -> str:
        """What it does, in a word."""
        return self._stage.value

    def start(self) -> None:
        """Fork it; once more when it has found modules unfit."""
        if self._attempts == MOST_ATTEMPTS:
            self._do_without(f"modules were found unfit {MOST_ATTEMPTS} times")
            return
        self._attempts += 1
        self._again = False
        try:
            process_tree.inherit_orphans()
            self._fork()
        except OSError as error:
            self._do_without(f"it cannot be started: {explain_start(error)}")

    def command(self, slot: int, report: int) -> None:
        """Have it fork a worker into a slot. Raises OSError."""
        if self._commands is None:
            raise BrokenPipeError
        send_command(self._commands, slot, report)

    def end(self) -> None:
        """Fork no worker from it any more. It has nothing to finish."""
        self._stage = _Stage.OVER
        self._timer.cancel()
        self._close_commands()
        self.kill()

    def ended(self, status: int) -> None:
        """It has ended and was waited for."""
        pid, self.pid = self.pid, 0
        if self._commands is not None:
            self._receive()  # its last message may not have been read yet
        self._close_commands()
        self._timer.cancel()
        how = self.describe_end(status)
        if self.forks:
            self._stage = _Stage.OVER
            text = (
                "The template of generation %d (pid %d) died: %s; until the next reload, each new "
                "worker imports its modules by itself"
            )
            LOGGER.error(text, self.generation.number, pid, how)
        elif self.imports and self._again:
            self.start()
        elif self.imports:
            self._stage = _Stage.OVER
            LOGGER.error("The template (pid %d) died at boot: %s", pid, how)
            reason = how if self.importing else f"the template died at boot: {how}"
            self._on_failed(self.generation, reason)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def main(context: WorkerContext) -> None:
            ours.close()
            self._spawner.mains.template(TemplateContext(context, theirs, tuple(self._kept_out)))

        try:
            pid = self._spawner.fork("The template", self.generation, main)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._commands = ours
        self._spawner.loop.watch(ours.fileno(), self._receive)
        self._started(pid)

    def _receive(self) -> None:
        assert self._commands is not None
        try:
            while (imports := receive_imports(self._commands)) is not None and imports.importing:
                self.importing = imports.importing
        except BlockingIOError:
            return
        if imports is None or not self.imports:
            self._close_commands()  # SIGCHLD tells how it ended
            return
        self._timer.cancel()
        self.importing = ""
        if imports.error is not None:
            LOGGER.error("Generation %d cannot start: %s", self.generation.number, imports.error)
            self.end()
            self._on_failed(self.generation, imports.error)
        elif imports.unfit:
            for name, reason in imports.unfit.items():
                LOGGER.info("Module %s is imported by each worker for itself: %s", name, reason)
            self._kept_out.update(imports.unfit)
            self._again = True
            self._close_commands()
            self.kill()
        elif not imports.shared:
            self._do_without(None)
        else:
            self._stage = _Stage.FORKS
            text = "Template ready (pid %d): %s imported for all workers"
            LOGGER.info(text, self.pid, count_of(imports.shared, "module"))
            self._on_ready(self.generation)

    def _do_without(self, reason: str | None) -> None:
        """Have each worker import for itself."""
        if reason is not None:
            text = "Generation %d has no template, each worker imports for itself: %s"
            LOGGER.warning(text, self.generation.number, reason)
        self.end()
        # Not from within `start`: its caller has not returned to the loop yet.
        self._spawner.loop.after(0.0, partial(self._on_ready, self.generation))

    def _close_commands(self) -> None:
        if self._commands is not None:
            self._spawner.loop.forget(self._commands.fileno())
            self._commands.close()
            self._commands = None


class Templates:
    """All templates of a master: one for each generation that has modules to share."""

    def __init__(
        self,
        spawner: Spawner,
        on_ready: Callable[[Generation], None],
        on_failed: Callable[[Generation, str], None],
    ) -> None:
        self._new = partial(Template, spawner, on_ready=on_ready, on_failed=on_failed)
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
        if template is not None:
            return template.imports
        if generation.stage is not Stage.BOOTS or not generation.settings.preloads_any:
            return False
        # Those of earlier generations are forgotten when they have ended.
        self._all = [each for each in self._all if each.pid or each.generation.stage != Stage.OVER]
        self._all.append(self._new(generation))
        self._all[-1].start()
        return True

    def end(self, generation: Generation) -> None:
        """A generation needs no more workers."""
        template = self.of(generation)
        if template is not None:
            template.end()

    def ended(self, pid: int, status: int) -> bool:
        """A child has ended; whether it was a template."""
        for template in self.alive:
            if template.pid == pid:
                template.ended(status)
                return True
        return False
