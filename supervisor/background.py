"""Putting the master in the background, and hearing from it how its start went.

The command forks twice, so that the master belongs to no terminal and to no shell's job control,
and waits on a pipe for one line: the master writes it when all workers are ready, or why there will
be no daemon. A master that dies without a word closes the pipe, and that is heard as well.
"""

import contextlib
import os
from collections.abc import Callable

import msgspec


class StartOutcome(msgspec.Struct):
    """What the master says of its start: its pid, or the error."""

    pid: int = 0
    error: str | None = None


def start(serve: Callable[[Callable[[str | None], None]], int]) -> StartOutcome:
    """Run `serve` as a daemon and wait until it calls what it is handed: None, or an error.

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
    with os.fdopen(read_end, "rb") as pipe:
        line = pipe.readline()
    if not line:
        return StartOutcome(error="the master died while starting; its log may say why")
    return msgspec.json.decode(line, type=StartOutcome)


def _be_the_daemon(write_end: int, serve: Callable[[Callable[[str | None], None]], int]) -> None:
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)

        def tell(error: str | None) -> None:
            line = msgspec.json.encode(StartOutcome(os.getpid(), error)) + b"\n"
            with contextlib.suppress(BrokenPipeError):  # whoever asked has not waited
                os.write(write_end, line)
            os.close(write_end)

        status = serve(tell)
    finally:
        os._exit(status)
