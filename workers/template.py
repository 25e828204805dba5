"""A template process: imports a generation's modules once, and forks workers that have them.

The template process has one thread. It imports what workers can share, reports the result, and
waits for commands to fork a worker. It ends when the master closes the command socket, or ends.
"""

import gc
import logging
import os
import signal
import socket
from contextlib import suppress
from typing import NoReturn

from cpanbridge.supervisor.processes.context import (
    Imports,
    TemplateContext,
    WorkerContext,
    receive_command,
    tell_imports,
)
from cpanbridge.supervisor.system.waiting import readable
from cpanbridge.supervisor.wording import explain_start
from cpanbridge.workers import boot, worker
from cpanbridge.workers.modules import builtin
from cpanbridge.workers.modules.forks import fork_worker
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError
from cpanbridge.workers.modules.preload import end_children, preload

LOGGER = logging.getLogger("cpanbridge.worker")


def run(context: TemplateContext) -> NoReturn:
    """A template's main function. Called in the child, right after the fork; ends the process."""
    boot.run_and_exit("The template", lambda: _serve(context))


def _serve(context: TemplateContext) -> int:
    name = f"template gen {context.worker.generation}"
    boot.set_up(context.worker, f"{name} imports")
    loader = Loader(context.worker.settings, builtin.NAMES)
    loader.on_import = lambda label: tell_imports(context.commands, Imports(importing=label))
    try:
        imports = preload(loader, context.worker.settings, context.kept_out)
    except ModuleLoadError as error:
        imports = Imports(error=str(error))
    if imports.error is not None or imports.unfit:
        end_children()  # this process ends, and nothing will use them
        tell_imports(context.commands, imports)
        return 0
    # The collector writes to the objects that it visits, and memory pages that are written to are
    # no longer shared.
    gc.collect()
    gc.freeze()
    boot.show_title(name)
    signals = boot.signal_wakeup()
    tell_imports(context.commands, imports)
    while (command := _next_command(context, signals)) is not None:
        slot, report = command
        _fork(context, loader, context.worker._replace(slot=slot, report=report))
        os.close(report)
    return 0


def _next_command(context: TemplateContext, signals: socket.socket) -> tuple[int, int] | None:
    """Wait for a command, see `receive_command`; reopen the logs when that is asked for."""
    while True:
        boot.reopen_logs_if_requested(context.worker)
        ready = readable([context.commands.fileno(), signals.fileno()], None)
        if signals.fileno() in ready:
            signals.recv(4096)
        if context.commands.fileno() in ready:
            return receive_command(context.commands)


def _fork(context: TemplateContext, loader: Loader, worker_context: WorkerContext) -> None:
    """Fork a worker that is the master's child: through a process in between that ends."""
    boot.flush_output()  # the worker would write what is buffered once more
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = fork_worker()
        if pid == 0:
            _fork_again(context, loader, worker_context)
        with suppress(ChildProcessError):  # a module may have set SIGCHLD to be ignored
            os.waitpid(pid, 0)
    except OSError as error:  # the master reads an end of file from the report
        LOGGER.error("The template cannot fork: %s", explain_start(error))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _fork_again(
    context: TemplateContext, loader: Loader, worker_context: WorkerContext
) -> NoReturn:
    """Called in the process in between. It ends, and the worker becomes the master's child.

    The master is the nearest subreaper (prctl(2), PR_SET_CHILD_SUBREAPER).
    """
    try:
        between = os.pidfd_open(os.getpid())
        if fork_worker() == 0:
            context.commands.close()
            worker.run_forked(worker_context, loader, between)
    finally:
        os._exit(1)
