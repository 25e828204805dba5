"""The log: one line per record, written with one write(2), by every process to one descriptor.

The kernel appends each write to a file whole (O_APPEND), so lines of several processes never mix.
The log is standard error. With `log_file` set, that file replaces standard output and standard
error before anything is forked. So the output of modules, and of an interpreter that crashes, is in
the log as well: as it is, or, in the JSON format, by way of the log process, which makes an object
of each line (see raw_output.py).

A log that cannot be written (a full disk, a closed pipe, a reader that has stopped reading) loses
lines and nothing else: there is no place left to report that, and the daemon goes on serving.
"""

import contextlib
import fcntl
import logging
import os
import socket
import stat
from typing import Literal, NamedTuple

from cpanbridge.supervisor.config import Loaded, OperatorError
from cpanbridge.supervisor.system.log_text import TIME, escaped, json_line, printable
from cpanbridge.supervisor.wording import explain

STANDARD_ERROR = 2
LOGGER = logging.getLogger("cpanbridge.master")


class LogError(OperatorError):
    """A log file cannot be opened."""


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback of a record's exception, or the one in its extra attribute `trace`."""
    if record.exc_info:
        return formatter.formatException(record.exc_info)
    return getattr(record, "trace", "")


class LineFormatter(logging.Formatter):
    """`2025-10-08 14:32:15 [WARNING] message`, with control characters shown escaped.

    A traceback follows, indented, so that none of its lines passes for a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{self.formatTime(record, TIME)} [{record.levelname}] {escaped(record.getMessage())}"
        )
        for each in _trace(self, record).splitlines():
            line += "\n    " + escaped(each)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: timestamp, level, pid, message, and traceback if there is one.

    A record's extra attribute `fields`, a dictionary, adds others.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": record.created,
            "level": record.levelname,
            "pid": os.getpid(),
            "message": printable(record.getMessage()),
        }
        if trace := _trace(self, record):
            line["traceback"] = printable(trace)
        line.update(getattr(record, "fields", {}))
        return json_line(line)


class LineWriter:
    """Writes each line to a descriptor with one system call, and never waits for a reader."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._socket = _nonblocking(descriptor)
        self._own = self._descriptor != descriptor

    def fileno(self) -> int:
        """The descriptor that it writes to."""
        return self._descriptor if self._socket is None else self._socket.fileno()

    def close(self) -> None:
        """Close what was opened to write without blocking."""
        if self._socket is not None:
            self._socket.close()
        elif self._own:
            self._own = False
            os.close(self._descriptor)

    def write(self, text: str) -> None:
        """Write a line, or some; the end of the last one is added."""
        line = (text + "\n").encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.send(line, socket.MSG_DONTWAIT)
            elif os.write(self._descriptor, line) < len(line):
                os.write(self._descriptor, b"\n")  # a full pipe has cut it


class DescriptorHandler(logging.Handler):
    """Writes each record as a line."""

    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = LineWriter(descriptor)
        self.setFormatter(formatter)

    def close(self) -> None:
        """Close what was opened to write without blocking."""
        super().close()
        self.writer.close()

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.write(self.format(record))


def _nonblocking(descriptor: int) -> tuple[int, socket.socket | None]:
    """A descriptor or a socket to write to without blocking when its reader has stopped.

    O_NONBLOCK belongs to the open file description, which other processes share (fcntl(2)): so a
    pipe or a terminal is opened again.
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
        return descriptor, None  # it may not be opened, such as another user's terminal


class LogSettings(NamedTuple):
    """The settings of the log.

    Without `follow_link` a `log_file` that is a symbolic link is refused: for a default path, where
    another user may have created one.
    """

    log_file: str
    security_log: str
    log_format: Literal["text", "json"]
    debug: bool
    follow_link: bool = True

    @classmethod
    def of(cls, loaded: Loaded) -> "LogSettings":
        """The log settings of a whole configuration."""
        log = loaded.settings
        where = log.log_file, log.security_log
        return cls(*where, log.log_format, log.debug, loaded.follow_link)


class _Current:
    """The current state of this process's log."""

    settings: LogSettings | None = None
    # Descriptors; -1: none yet.
    log: int = -1
    security: int = -1
    # Where standard output and standard error lead instead of to the log, in the JSON format. -1:
    # nowhere else.
    output: int = -1


def configure(settings: LogSettings) -> None:
    """Set up the log of this process and its future children.

    Without effect when the settings are the current ones. Raises LogError, and changes nothing.
    """
    if settings == _Current.settings:
        return
    security = _open(settings.security_log) if settings.security_log != "-" else -1
    try:
        _open_log(settings)
    except LogError:
        if security >= 0:
            os.close(security)
        raise
    _direct_output(settings)
    formatter = JsonFormatter() if settings.log_format == "json" else LineFormatter()
    root = logging.getLogger("cpanbridge")
    _replace_handlers(root, DescriptorHandler(_Current.log, formatter))
    root.setLevel(logging.DEBUG if settings.debug else logging.INFO)
    root.propagate = False
    logger = logging.getLogger("cpanbridge.security")
    # Its messages are lines of JSON already.
    own = [DescriptorHandler(security, logging.Formatter())] if security >= 0 else []
    _replace_handlers(logger, *own)
    logger.propagate = not own
    if _Current.security >= 0:
        os.close(_Current.security)
    _Current.settings, _Current.security = settings, security


def capture(output: int) -> None:
    """From now on, output leads to this descriptor as long as the format is JSON; -1: to the log.

    The descriptor stays the caller's.
    """
    _Current.output = output
    if _Current.settings is not None:
        _direct_output(_Current.settings)


def keep_captured() -> None:
    """Called in a forked child: output leads there already, and the descriptor can be closed."""
    _Current.output = STANDARD_ERROR


def writes_json() -> bool:
    """Whether the format is JSON."""
    return _Current.settings is not None and _Current.settings.log_format == "json"


def writer() -> LineWriter:
    """What writes lines to the log. Called once that is set up."""
    (handler,) = logging.getLogger("cpanbridge").handlers
    assert isinstance(handler, DescriptorHandler)
    return handler.writer


def inherited_error() -> int:
    """What another program is to `inherit`: where the log is standard error; -1: a file is."""
    settings = _Current.settings
    return _Current.log if settings is not None and settings.log_file == "stderr" else -1


def inherit(error: int) -> None:
    """Standard error is this descriptor: the present one leads to another master's log process.

    Called before `configure`.
    """
    os.set_inheritable(error, False)
    _Current.log = error


def descriptors() -> list[int]:
    """The descriptors of the open log files, whose owner a new user must become."""
    settings = _Current.settings
    found = [_Current.log] if settings is not None and settings.log_file != "stderr" else []
    return found + ([_Current.security] if _Current.security >= 0 else [])


def check(settings: LogSettings) -> None:
    """Check that the files can be opened. Raises LogError."""
    for path in (settings.log_file, settings.security_log):
        if path not in ("stderr", "-"):
            os.close(_open(path))


def reopen() -> None:
    """Open the files anew, after the old ones were renamed. Raises LogError.

    The descriptors keep their numbers, and dup2(2) replaces them atomically: a line that another
    thread writes meanwhile is whole in the old file or in the new one.
    """
    settings = _Current.settings
    if settings is None:
        return
    _open_log(settings)
    _direct_output(settings)
    if _Current.security >= 0:
        descriptor = _open(settings.security_log)
        os.dup2(descriptor, _Current.security, inheritable=False)
        os.close(descriptor)


def _open_log(settings: LogSettings) -> None:
    """Open the log under the number that it has. Raises LogError."""
    if settings.log_file == "stderr":
        if _Current.log < 0:
            _Current.log = fcntl.fcntl(STANDARD_ERROR, fcntl.F_DUPFD_CLOEXEC, STANDARD_ERROR + 1)
        return
    descriptor = _open(settings.log_file, 0 if settings.follow_link else os.O_NOFOLLOW)
    if _Current.log < 0:
        _Current.log = descriptor
    else:
        os.dup2(descriptor, _Current.log, inheritable=False)
        os.close(descriptor)


def _direct_output(settings: LogSettings) -> None:
    captured = settings.log_format == "json" and _Current.output >= 0
    target = _Current.output if captured else _Current.log
    os.dup2(target, STANDARD_ERROR)
    if settings.log_file != "stderr":
        os.dup2(target, 1)


def _replace_handlers(logger: logging.Logger, *handlers: logging.Handler) -> None:
    before, logger.handlers = logger.handlers, list(handlers)
    for each in before:
        each.close()


def _open(path: str, extra: int = 0) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags | extra, 0o640)
    except OSError as error:
        raise LogError(f"{path}: cannot be opened for the log: {explain(error)}") from None
