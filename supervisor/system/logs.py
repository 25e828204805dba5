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
from typing import Literal, NamedTuple

from cpanbridge.supervisor.config import Loaded
from cpanbridge.supervisor.system.log_text import escaped, json_line, printable

STANDARD_ERROR = 2
LOGGER = logging.getLogger("cpanbridge.master")


class LogError(Exception):
    """A log file cannot be opened; one line that says which and why."""


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback of a record's exception, or one that it was given as `extra`: `trace`."""
    if record.exc_info:
        return formatter.formatException(record.exc_info)
    return getattr(record, "trace", "")


class LineFormatter(logging.Formatter):
    """`2025-10-08 14:32:15 [WARNING] message`, with control characters shown escaped.

    A traceback follows on lines of its own, indented, so that none passes for a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{when} [{record.levelname}] {escaped(record.getMessage())}"
        for each in _trace(self, record).splitlines():
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
        if trace := _trace(self, record):
            line["traceback"] = printable(trace)
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
        self._own = self._descriptor != descriptor
        self.setFormatter(formatter)

    def close(self) -> None:
        """Give up what was opened to write without waiting."""
        super().close()
        if self._socket is not None:
            self._socket.close()
        elif self._own:
            self._own = False
            os.close(self._descriptor)

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


class LogSettings(NamedTuple):
    """The settings that a log follows.

    Without `follow_link` a `log_file` that is a symbolic link is refused: for a place that nobody
    chose, where somebody else may have put one.
    """

    log_file: str
    security_log: str
    log_format: Literal["text", "json"]
    debug: bool
    follow_link: bool = True

    @classmethod
    def of(cls, loaded: Loaded) -> "LogSettings":
        """Those of a whole configuration."""
        settings = loaded.settings
        return cls(
            settings.log_file,
            settings.security_log,
            settings.log_format,
            settings.debug,
            loaded.follow_link,
        )


class _Current:
    """What this process's log was set up with."""

    settings: LogSettings | None = None
    security: int = -1  # the security log's descriptor


def configure(settings: LogSettings) -> None:
    """Set up this process's log, and that of all it forks. Raises LogError, and changes nothing.

    Without effect when it was set up so already.
    """
    if settings == _Current.settings:
        return
    security = _open(settings.security_log) if settings.security_log != "-" else -1
    try:
        _open_log_file(settings)
    except LogError:
        if security >= 0:
            os.close(security)
        raise
    formatter = JsonFormatter() if settings.log_format == "json" else LineFormatter()
    root = logging.getLogger("cpanbridge")
    _replace_handler(root, DescriptorHandler(STANDARD_ERROR, formatter))
    root.setLevel(logging.DEBUG if settings.debug else logging.INFO)
    root.propagate = False
    logger = logging.getLogger("cpanbridge.security")
    _replace_handler(
        logger, DescriptorHandler(security, PlainFormatter()) if security >= 0 else None
    )
    logger.propagate = security < 0
    if _Current.security >= 0:
        os.close(_Current.security)
    _Current.settings, _Current.security = settings, security


def descriptors() -> list[int]:
    """Those of the log files that were opened, which others are to write to."""
    settings = _Current.settings
    found = [STANDARD_ERROR] if settings is not None and settings.log_file != "stderr" else []
    return found + ([_Current.security] if _Current.security >= 0 else [])


def check(settings: LogSettings) -> None:
    """See that the files can be opened. Raises LogError."""
    for path in (settings.log_file, settings.security_log):
        if path not in ("stderr", "-"):
            os.close(_open(path))


def reopen() -> None:
    """Go on in new files of the same names, once the old ones were renamed. Raises LogError.

    The descriptors keep their numbers, and dup2(2) changes over in one step: a line that another
    thread writes meanwhile is whole in the old file or in the new one.
    """
    settings = _Current.settings
    if settings is None:
        return
    _open_log_file(settings)
    if _Current.security >= 0:
        descriptor = _open(settings.security_log)
        os.dup2(descriptor, _Current.security, inheritable=False)
        os.close(descriptor)


def _open_log_file(settings: LogSettings) -> None:
    if settings.log_file != "stderr":
        descriptor = _open(settings.log_file, 0 if settings.follow_link else os.O_NOFOLLOW)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, STANDARD_ERROR)
        os.close(descriptor)


def _replace_handler(logger: logging.Logger, handler: DescriptorHandler | None) -> None:
    before, logger.handlers = logger.handlers, [handler] if handler is not None else []
    for each in before:
        each.close()


def _open(path: str, extra: int = 0) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | extra, 0o640)
    except OSError as error:
        raise LogError(f"{path}: cannot be opened for the log: {error.strerror}") from None
