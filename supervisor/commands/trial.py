"""Trying what may change, hang or end a process: becoming the daemon's user, importing modules.

It runs in a child process, which has as long as a process of the daemon has to boot. The child
writes messages, each a line: what it imports now, and at the end its result or what was wrong.
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

import msgspec
import psutil

from cpanbridge.supervisor.commands.common import CommandError
from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.control.client import Show
from cpanbridge.supervisor.processes import spawner
from cpanbridge.supervisor.system.log_text import describe_exit, printable
from cpanbridge.supervisor.system.waiting import readable
from cpanbridge.supervisor.wording import explain_with_path

_FRAME = re.compile(r'File "([^<].*)", line (\d+)')
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
_PACKAGE = str(Path(__file__).parents[2])

# Called in the child before each import, with the module as errors name it.
Tell = Callable[[str], None]


class _Message(msgspec.Struct):
    importing: str = ""
    result: list[str] | None = None
    problems: list[str] | None = None


def try_in_child(work: Callable[[Tell], list[str]], show: Show) -> list[str]:
    """What `work` returns in a child process. Raises CommandError with all that is wrong.

    `show` is called with the progress. What modules print goes to standard error. No process is
    left, nor what modules have started.
    """
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile("w+") as stacks, ours:
        child = os.fork()
        if child == 0:
            ours.close()
            _be_child(work, theirs, stacks)
        theirs.close()
        try:
            message, in_time = _last_message(ours, child, show)
            place = "" if in_time else _place(child, stacks)
        finally:
            status = _end(child)
    if message.result is not None:
        return message.result
    if message.problems is not None:
        raise CommandError(*message.problems)
    importing = message.importing
    if in_time:
        what = f"{importing}: its import ended the process" if importing else "the check ended"
        raise CommandError(f"{what}: {describe_exit(status)}")
    what = f"{importing}: not imported" if importing else "the check is not finished"
    raise CommandError(f"{what} after {spawner.BOOT_SECONDS:g} s{place}")


def _be_child(work: Callable[[Tell], list[str]], end: socket.socket, stacks: IO[str]) -> NoReturn:
    def send(message: _Message) -> None:
        end.sendall(msgspec.json.encode(message) + b"\n")

    try:
        os.dup2(2, 1)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=False, chain=False)
        try:
            message = _Message(result=work(lambda label: send(_Message(printable(label)))))
        except OperatorError as error:
            message = _Message(problems=[printable(each) for each in error.problems])
        except OSError as error:
            message = _Message(problems=[printable(explain_with_path(error))])
        except Exception as error:
            traceback.print_exc()
            fault = f"a fault of the check's own: {type(error).__name__}: {error}"
            message = _Message(problems=[printable(fault)])
        send(message)
        end.recv(1)  # until the command ends it, with what modules have started
    finally:
        os._exit(1)


def _last_message(end: socket.socket, child: int, show: Show) -> tuple[_Message, bool]:
    """The child's last message, and whether it came to its end in time."""
    until = time.monotonic() + spawner.BOOT_SECONDS
    data, message = b"", _Message()
    with open(os.pidfd_open(child), "rb") as process:
        ended = process.fileno()
        while (left := until - time.monotonic()) > 0:
            # Something that the child has left may hold its end open.
            ready = readable([end.fileno(), ended], left)
            chunk = end.recv(65536) if end.fileno() in ready else b""
            *lines, data = (data + chunk).split(b"\n")
            if lines:
                message = msgspec.json.decode(lines[-1], type=_Message)
                show(f"importing {message.importing}" if message.importing else "")
            if message.result is not None or message.problems is not None:
                return message, True
            if ready and not chunk:
                return message, True
    return message, False


def _place(child: int, stacks: IO[str]) -> str:
    """Where the child's main thread is now, as far as it can still be asked."""
    os.kill(child, signal.SIGUSR2)
    until = time.monotonic() + spawner.DUMP_SECONDS
    frames: list[tuple[str, str]] = []
    while not frames and time.monotonic() < until:
        time.sleep(0.01)
        stacks.seek(0)
        frames = _FRAME.findall(stacks.read())
    # The line in the operator's own code says more than the one in a library that it called.
    theirs = [frame for frame in frames if not frame[0].startswith(_PACKAGE)]
    own = [frame for frame in theirs if not frame[0].startswith(_LIBRARIES)] or theirs
    return f"; it is at {own[0][0]}:{own[0][1]}" if own else ""


def _end(child: int) -> int:
    """End the child and what it has started; its wait status."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(child).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    os.kill(child, signal.SIGKILL)  # it stays this process's child until it was waited for
    return os.waitpid(child, 0)[1]
