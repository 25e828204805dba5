"""The log: one line a record, written with one write(2), from every process to one descriptor.

The kernel appends each write to a file whole (O_APPEND), so lines of several processes never mix.
The log is standard error; with `log_file` set, that file is put in the place of standard output and
standard error before anything is forked. So what modules print, and what the interpreter says when
it crashes, are found in the log as well.

A log that cannot be written (a full disk, a closed pipe) loses lines, and nothing else: there is
nowhere left to say so, and clients are served on.
"""

import contextlib
import json
import logging
import os
import re
import time
from typing import Literal

STANDARD_ERROR = 2
LOGGER = logging.getLogger("cpanbridge.master")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class LogError(Exception):
    """A log file cannot be opened; one line that says which and why."""


class LineFormatter(logging.Formatter):
    """`2025-10-08 14:32:15 [WARNING] message`, with control characters shown escaped.

    A traceback follows on lines of its own, indented, so that none passes for a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{when} [{record.levelname}] {_escaped(record.getMessage())}"
        if record.exc_info:
            for each in self.formatException(record.exc_info).split("\n"):
                line += "\n    " + _escaped(each)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp, level, pid, message, and traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": record.created,
            "level": record.levelname,
            "pid": os.getpid(),
            "message": record.getMessage().encode("utf-8", "backslashreplace").decode(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json_line(line)


def json_line(value: object) -> str:
    """JSON in ASCII without a control character: one line for whatever reads it."""
    return json.dumps(value).replace("\x7f", "\\u007f")


class PlainFormatter(logging.Formatter):
    """The message alone: what is logged is a line of JSON already."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


class DescriptorHandler(logging.Handler):
    """Writes each record to a descriptor with one system call."""

    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        with contextlib.suppress(OSError):
            os.write(self._descriptor, line.encode("utf-8", "backslashreplace"))


def configure(
    log_file: str, security_log: str, log_format: Literal["text", "json"], debug: bool
) -> None:
    """Set up this process's log, and that of all it forks. Raises LogError."""
    if log_file != "stderr":
        descriptor = _open(log_file)
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


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise LogError(f"{path}: cannot be opened for the log: {error.strerror}") from None


def _escaped(text: str) -> str:
    """Control characters as escapes: what a client sends must not begin a line of its own."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
