"""Starting the master in the background, and receiving the outcome of its start.

The command forks twice, so that the master belongs to no terminal and to no shell's job control. It
waits on a pipe for one message. The master writes it when all workers are ready, or with the reason
why there will be no daemon; then it has ended when the command reports that. A master that dies
without a message closes the pipe. Called in the command, and in the process that it forks.
"""

import contextlib
import logging
import os
from collections.abc import Callable

import msgspec

from cpanbridge.supervisor.system.log_text import printable

LOGGER = logging.getLogger("cpanbridge.master")


class StartOutcome(msgspec.Struct):
    """The message: the master's pid, or the error."""

    pid: int = 0
    error: str | None = None


def start(
    serve: Callable[[Callable[[str | None], None]], int], wait: Callable[[int], object]
) -> StartOutcome:
    """Run `serve` as a daemon; returns when it has called its argument with None or an error.

    `serve` runs in another process, and its result is the exit status of that. Standard input is
    /dev/null there; output is for `serve` to redirect. `wait` is called in this process; it returns
    when the descriptor that is its argument is readable.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            os.setsid()
            if os.fork() == 0:
                _run_daemon(write_end, serve)
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    wait(read_end)
    with os.fdopen(read_end, "rb") as pipe:
        line = pipe.read()  # to the end: a master that has failed keeps it open until it has ended
    if not line:
        return StartOutcome(error="the master died while starting; its log may say why")
    return msgspec.json.decode(line, type=StartOutcome)


def _run_daemon(write_end: int, serve: Callable[[Callable[[str | None], None]], int]) -> None:
    pipe = [write_end]
    reported = False

    def close_pipe() -> None:
        for descriptor in pipe:
            os.close(descriptor)
        pipe.clear()

    def report(error: str | None) -> None:
        nonlocal reported
        if not reported:
            reported = True
            with contextlib.suppress(BrokenPipeError):  # the command has been killed
                os.write(write_end, msgspec.json.encode(StartOutcome(os.getpid(), error)))
        if error is None:
            close_pipe()

    status = 1
    try:
        # The pipe must be closed when the master ends, whatever workers it leaves.
        os.register_at_fork(after_in_child=close_pipe)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        status = serve(report)
    except BaseException as error:
        LOGGER.critical("The master ends by a fault of the daemon's own", exc_info=True)
        report(printable(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(status)
