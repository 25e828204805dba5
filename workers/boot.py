"""The first steps of a worker or a template after the fork: from the master's state to its own.

Called in the child.
"""

import contextlib
import ctypes
import faulthandler
import io
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

import setproctitle

from cpanbridge.supervisor.processes.context import WorkerContext, wait_to_begin
from cpanbridge.supervisor.system.logs import LogError
from cpanbridge.supervisor.system.waiting import readable
from cpanbridge.workers.modules.forks import clean_up_children

LOGGER = logging.getLogger("cpanbridge.worker")

_PR_SET_PDEATHSIG = 1  # see prctl(2)
_M_ARENA_MAX = -8  # see mallopt(3)
_ARENAS = 2
_libc = ctypes.CDLL(None)
_prctl = _libc.prctl

_reopen_requested = False  # written by the handler of USR1, in the main thread


def run_and_exit(name: str, main: Callable[[], int]) -> NoReturn:
    """Run the process's main function, and exit with the status that it returns."""
    status = 1
    try:
        status = main()
    except BaseException:
        LOGGER.exception("%s ends by a fault of the daemon's own", name)
    finally:
        flush_output()
        os._exit(status)  # never return into the master's code


def set_up(context: WorkerContext, title: str) -> None:
    """Undo what the master has set up for itself, and prepare to import modules."""
    _reset_signals()
    _end_with_living_master(context)
    show_title(title)
    _share_freed_memory()
    faulthandler.enable()
    # Writes all threads' stacks to the log, without needing the interpreter lock. The master sends
    # the signal when a process does not boot; an operator may send it at any time.
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    # What modules print goes to the log, in UTF-8 like the log itself, whatever the locale is.
    os.dup2(2, 1)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = _text_stream(descriptor)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    paths = [str(each.getsockname()) for each in context.listeners]
    clean_up_children(paths, context.listener_box)


def _share_freed_memory() -> None:
    """Have few arenas for all threads: each keeps what its thread has freed, up to 64 MB.

    With the interpreter lock threads hardly ever allocate at the same time.
    """
    with contextlib.suppress(AttributeError):  # not the GNU C library
        _libc.mallopt(_M_ARENA_MAX, _ARENAS)


def set_up_forked(context: WorkerContext, title: str, parent: int) -> None:
    """The same for a worker that a template has forked, which has done most of it.

    `parent` is a pidfd of the process between the two. When it is readable, that process has ended,
    and the kernel has made the master this one's parent. Called with all signals blocked.
    """
    signal.set_wakeup_fd(-1)  # the template's
    show_title(title)
    readable([parent], None)
    os.close(parent)
    _end_with_living_master(context)
    if not wait_to_begin(context.report):
        os._exit(0)
    reopen_logs(context)  # the master may have sent USR1 before it knew of this process
    # Python seeds its own generator anew after a fork.
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def show_title(title: str) -> None:
    """Set the title that ps(1) shows."""
    setproctitle.setproctitle(f"cpanbridged: {title}")


def _text_stream(descriptor: int) -> io.TextIOWrapper:
    # Not the interpreter's own ones with another encoding: those may believe that they can seek,
    # which a file could that was here when the interpreter started.
    raw = io.FileIO(descriptor, "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, "utf-8", "backslashreplace", line_buffering=True)


def flush_output() -> None:
    """Write out what modules have printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def reopen_logs_if_requested(context: WorkerContext) -> None:
    """After a USR1. The handler does nothing itself: whatever it interrupts may hold a lock."""
    if _reopen_requested:
        reopen_logs(context)


def reopen_logs(context: WorkerContext) -> None:
    """Go on in new log files of the same names, or in the old ones when that fails."""
    global _reopen_requested
    _reopen_requested = False
    try:
        context.reopen_logs()
    except LogError as error:
        LOGGER.error("Process %d: the log stays where it is: %s", os.getpid(), error)


def end_with_master(enabled: bool) -> None:
    """Whether the kernel kills this process when the process that forked it ends.

    It must not outlive its master, which alone can let it serve. Once booted, a worker reads the
    end of the lifeline; while it imports modules it reads nothing, and an import may hang.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if enabled else 0, 0, 0, 0)


def _end_with_living_master(context: WorkerContext) -> None:
    end_with_master(True)
    if readable([context.lifeline], 0):
        os._exit(1)  # it had ended before the kernel was told


def signal_wakeup() -> socket.socket:
    """From now on this socket is readable after each signal, and has the numbers of all."""
    signals, wakeup = socket.socketpair()
    for end in (signals, wakeup):
        end.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
    return signals


def _request_reopening(*_: object) -> None:
    global _reopen_requested
    _reopen_requested = True


def _reset_signals() -> None:
    """Undo the master's handlers. None is ignored: what modules start would inherit that."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, _request_reopening)
    # These reach the whole process group of a terminal, and are for the master alone.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
