"""Putting the master in the background, and hearing from it how its start went.

The command forks twice, so that the master belongs to no terminal and to no shell's job control,
and waits on a pipe for one message: the master writes it when all workers are ready, or why there
will be no daemon, and has ended by the time that is reported. A master that dies without a word
closes the pipe, and that is heard as well.
"""

import contextlib
import logging
import os
from collections.abc import Callable

import msgspec

from cpanbridge.supervisor.system.log_text import describe_exit, printable

LOGGER = logging.getLogger("cpanbridge.master")

_MOST = 4000  # bytes of an error: a pipe takes them without a reader


class StartOutcome(msgspec.Struct):
    """What the master says of its start: its pid, or the error."""

    pid: int = 0
    error: str | None = None


def start(
    serve: Callable[[Callable[[str | None], None]], int], wait: Callable[[int], object]
) -> StartOutcome:
    """Run `serve` as a daemon and wait until it calls what it is handed: None, or an error.

    `wait` is called meanwhile, and returns when the descriptor that it is handed is readable.

    The process that calls this goes on; `serve` runs in another one and its result is that one's
    exit status. Standard input is /dev/null there; output is for `serve` to redirect.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            os.setsid()
            if os.fork() == 0:
                _be_the_daemon(write_end, serve)
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    wait(read_end)
    with os.fdopen(read_end, "rb") as pipe:
        line = pipe.read()  # to the end: a master that has failed keeps it open until it is gone
    if not line:
        return StartOutcome(error="the master died while starting; its log may say why")
    return msgspec.json.decode(line, type=StartOutcome)


def try_in_child(work: Callable[[], object]) -> str | None:
    """Run `work` in a process of its own; None, or what it raised, or how the process ended.

    For what would change this process or the daemon's fate: importing modules.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        error = ""
        try:
            os.close(read_end)
            os.dup2(2, 1)
            work()
        except BaseException as raised:
            error = printable(str(raised)) or type(raised).__name__
        finally:
            os.write(write_end, b"\0" + error.encode()[:_MOST])
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if not told:
        return f"a module ended the process: {describe_exit(status)}"
    return told[1:].decode("utf-8", "replace") or None


def _be_the_daemon(write_end: int, serve: Callable[[Callable[[str | None], None]], int]) -> None:
    pipe = [write_end]
    told: list[str | None] = []

    def close_pipe() -> None:
        for descriptor in pipe:
            os.close(descriptor)
        pipe.clear()

    def tell(error: str | None) -> None:
        if not told:
            told.append(error)
            with contextlib.suppress(BrokenPipeError):  # whoever asked has not waited
                os.write(write_end, msgspec.json.encode(StartOutcome(os.getpid(), error)))
        if error is None:
            close_pipe()

    status = 1
    try:
        # The pipe must end with the master, whatever workers it leaves.
        os.register_at_fork(after_in_child=close_pipe)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        status = serve(tell)
    except BaseException as error:
        LOGGER.critical("The master ends by a fault of the daemon's own", exc_info=True)
        tell(printable(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(status)
