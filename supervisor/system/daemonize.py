"""Starting the master in the background, and receiving the outcome of its start.

The command forks twice, so that the master belongs to no terminal and to no shell's job control. It
reads a pipe. The master writes its pid there at first, and a message when all workers are ready, or
with the reason why there will be no daemon; then it has ended when the command reports that. A
master that dies without a message closes the pipe. When the command is interrupted before, it ends
the master. Called in the command, and in the process that it forks.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import msgspec

from cpanbridge.supervisor.system.log_text import printable
from cpanbridge.supervisor.system.waiting import readable

LOGGER = logging.getLogger("cpanbridge.master")

_INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


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
    when the descriptor that is its argument is readable. Raises KeyboardInterrupt when this process
    is told to end meanwhile; then that process has ended.
    """
    read_end, write_end = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTIONS)  # until there is what to end
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            os.setsid()
            if os.fork() == 0:
                _run_daemon(write_end, serve, mask)
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with (
        os.fdopen(read_end, "rb", buffering=0) as pipe,
        _ended_if_interrupted(pipe.readline(), mask),
    ):
        wait(read_end)
        line = pipe.read()  # to the end: a master that has failed keeps it open until it has ended
    if not line:
        return StartOutcome(error="the master died while starting; its log may say why")
    return msgspec.json.decode(line, type=StartOutcome)


@contextlib.contextmanager
def _ended_if_interrupted(master: bytes, mask: Iterable[int]) -> Iterator[None]:
    """End a master that starts when this process is told to end: by ^C, TERM, a closed terminal.

    `master` is its pid as it was read. Sets the signal mask.
    """
    try:
        handle = os.pidfd_open(int(master))
    except (ValueError, ProcessLookupError):  # it is dead
        handle = -1
    ignored = [each for each in _INTERRUPTIONS if signal.getsignal(each) is signal.SIG_IGN]
    before = {each: signal.getsignal(each) for each in _INTERRUPTIONS.difference(ignored)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
    except KeyboardInterrupt:
        if handle >= 0:
            _end(handle)
        raise
    finally:
        if handle >= 0:
            os.close(handle)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(handle: int) -> None:
    """Stop the master, and wait until it has ended; at once when this is interrupted again."""
    for number in (signal.SIGTERM, signal.SIGQUIT):
        with contextlib.suppress(KeyboardInterrupt):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            readable([handle], None)
            return


def _run_daemon(
    write_end: int,
    serve: Callable[[Callable[[str | None], None]], int],
    mask: Iterable[int],
) -> None:
    pipe = [write_end]
    reported = False
    # Until the master catches it: what has been made so far is given back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)

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
        os.write(write_end, b"%d\n" % os.getpid())
        status = serve(report)
    except KeyboardInterrupt:
        report("interrupted")
    except BaseException as error:
        LOGGER.critical("The master ends by a fault of the daemon's own", exc_info=True)
        report(printable(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(status)
