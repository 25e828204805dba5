"""The log: one line a record, written with one write(2), from every process to one descriptor.

The kernel appends each write to a file whole (O_APPEND), so lines of several processes never mix.
The log is standard error; with `log_file` set, that file is put in the place of standard output and
standard error before anything is forked. So what modules print, and what the interpreter says when
it crashes, are found in the log as well.

A log that cannot be written (a full disk, a closed pipe, a reader that has stopped reading) loses
lines, and nothing else: there is nowhere left to say so, and clients are served on.
"""

import contextlib
import logging
import os
import socket
import stat
import time
from typing import Literal

from cpanbridge.supervisor.text import escaped, json_line, printable

STANDARD_ERROR = 2
LOGGER = logging.getLogger("cpanbridge.master")


class LogError(Exception):
    """A log file cannot be opened; one line that says which and why."""


class LineFormatter(logging.Formatter):
    """`2025-10-08 14:32:15 [WARNING] message`, with control characters shown escaped.

    A traceback follows on lines of its own, indented, so that none passes for a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{when} [{record.levelname}] {escaped(record.getMessage())}"
        if record.exc_info:
            for each in self.formatException(record.exc_info).split("\n"):
                line += "\n    " + escaped(each)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp, level, pid, message, and traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": record.created,
            "level": record.levelname,
            "pid": os.getpid(),
            "message": printable(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = printable(self.formatException(record.exc_info))
        return json_line(line)


class PlainFormatter(logging.Formatter):
    """The message alone: what is logged is a line of JSON already."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


class DescriptorHandler(logging.Handler):
    """Writes each record to a descriptor with one system call, and never waits for a reader."""

    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self._descriptor, self._socket = _never_waiting(descriptor)
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.send(line, socket.MSG_DONTWAIT)
            elif os.write(self._descriptor, line) < len(line):
                os.write(self._descriptor, b"\n")  # cut by a full pipe: the next begins anew


def _never_waiting(descriptor: int) -> tuple[int, socket.socket | None]:
    """A way to write to what a descriptor is, such that a reader who has stopped holds up nobody.

    O_NONBLOCK belongs to the open file, which others share: so a pipe or a terminal is opened
    again.
    """
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(kind):
        return descriptor, socket.socket(fileno=os.dup(descriptor))
    if stat.S_ISREG(kind):
        return descriptor, None
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags), None
    except OSError:
        return descriptor, None  # not ours to open, such as another user's terminal


def configure(
    log_file: str,
    security_log: str,
    log_format: Literal["text", "json"],
    debug: bool,
    *,
    follow_link: bool = True,
) -> None:
    """Set up this process's log, and that of all it forks. Raises LogError.

    Without `follow_link` a `log_file` that is a symbolic link is refused: for a place that nobody
    chose, where somebody else may have put one.
    """
    if log_file != "stderr":
        descriptor = _open(log_file, 0 if follow_link else os.O_NOFOLLOW)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, STANDARD_ERROR)
        os.close(descriptor)
    formatter = JsonFormatter() if log_format == "json" else LineFormatter()
    root = logging.getLogger("cpanbridge")
    root.handlers = [DescriptorHandler(STANDARD_ERROR, formatter)]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
    if security_log != "-":
        security = logging.getLogger("cpanbridge.security")
        security.handlers = [DescriptorHandler(_open(security_log), PlainFormatter())]
        security.propagate = False


def _open(path: str, extra: int = 0) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | extra, 0o640)
    except OSError as error:
        raise LogError(f"{path}: cannot be opened for the log: {error.strerror}") from None
