"""From the master's process to a worker's or a template's: the first steps after the fork.

Called in the child.
"""

import contextlib
import faulthandler
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import setproctitle

from cpanbridge.supervisor.processes.context import WorkerContext, wait_to_begin
from cpanbridge.supervisor.system.logs import LogError
from cpanbridge.workers.modules.forks import let_go_in_children
from cpanbridge.workers.modules.orphans import end_with_master

LOGGER = logging.getLogger("cpanbridge.worker")

_FOR_THE_MASTER = (signal.SIGINT, signal.SIGHUP)


def run_to_the_end(name: str, main: Callable[[], int]) -> NoReturn:
    """Run all that the process is for, and end with the status that it returns."""
    status = 1
    try:
        status = main()
    except BaseException:
        LOGGER.exception("%s ends by a fault of the daemon's own", name)
    finally:
        flush_output()
        os._exit(status)  # never back into the master's code


def begin(context: WorkerContext, title: str) -> None:
    """Let go of what the master has set up for itself, and get ready to import modules."""
    _reset_signals(context)
    _end_with_a_master_that_is_there(context)
    show_title(title)
    faulthandler.enable()
    # What each thread is at, written to the log without the interpreter's help: the master asks
    # for it when a process does not boot, and whoever looks into a worker may.
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    # What modules print goes where the log goes, never to a client or the terminal's reader.
    os.dup2(2, 1)
    # It is UTF-8 as the log is, in any locale.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                encoding="utf-8",
                errors="backslashreplace",
                line_buffering=True,
                write_through=False,
            )
    let_go_in_children([str(each.getsockname()) for each in context.listeners])


def begin_forked(context: WorkerContext, title: str, parent: int) -> None:
    """The same in what a template has forked, which has done most of it; all signals are blocked.

    `parent` is a pidfd. When it is readable, its process has ended, and the kernel has given this
    one to the master before.
    """
    show_title(title)
    select.select([parent], [], [])
    os.close(parent)
    _end_with_a_master_that_is_there(context)
    if not wait_to_begin(context.report):
        os._exit(0)
    reopen_logs(context)  # the master may have sent USR1 before it knew of this process
    # Python's own generator does so by itself.
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def show_title(title: str) -> None:
    """What ps(1) is to show."""
    setproctitle.setproctitle(f"cpanbridged: {title}")


def flush_output() -> None:
    """Write what modules have printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def reopen_logs(context: WorkerContext) -> None:
    """Go on in new log files of the same names."""
    try:
        context.reopen_logs()
    except LogError as error:
        LOGGER.error("Process %d: the log stays where it is: %s", os.getpid(), error)


def _end_with_a_master_that_is_there(context: WorkerContext) -> None:
    end_with_master(True)
    if select.select([context.lifeline], [], [], 0)[0]:
        os._exit(1)  # it has ended before that


def _reset_signals(context: WorkerContext) -> None:
    """Undo the master's handlers. Ignored signals would be inherited by what modules start."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, lambda *_: reopen_logs(context))
    for number in _FOR_THE_MASTER:
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
