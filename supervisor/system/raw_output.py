"""What is written to the descriptors 1 and 2, as lines of the log in its JSON format.

In that format each line is an object, whatever writes it: a module's `print`, a program that a
module has started, a C library, the interpreter that crashes. So in all processes of the daemon
these two descriptors are one end of a pair of sockets. The other end is read by the log process,
which writes an object for each line.

- It is a process of its own: the master must not wait for a disk, nor be kept busy by a module that
  writes without an end. Such a module waits when the socket is full, as it would for a disk.
- With each piece the kernel tells which process has written it (SCM_CREDENTIALS). So one pair is
  enough for all, and pieces of lines that several processes write do not mix.
- What was written is the kernel's, whoever dies then. The log process takes a piece out of the
  socket when its lines are in the log. So when it is killed, at whatever instruction, no line is
  lost but what it has seen of an unfinished one; some may be written twice.
- It ends when the last process that may write has ended, and outlives the master if need be.

A file could be opened anew as /dev/stderr, which a socket cannot: as in a service of systemd that
logs to the journal.
"""

import math
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator

from cpanbridge.supervisor.system.log_text import json_line
from cpanbridge.supervisor.system.waiting import readable

MOST = 65536  # bytes at a time
LONGEST_LINE = 8192  # bytes; the rest of a longer one is another line
UNFINISHED_SECONDS = 1.0  # a line that is not continued for so long is written as it is
_UCRED = struct.Struct("3i")


class Lines:
    """Puts the pieces that processes write together to lines. Times are in seconds."""

    def __init__(self) -> None:
        self._unfinished: dict[int, tuple[bytes, float]] = {}  # by pid; and until when to wait

    def add(self, pid: int, piece: bytes, now: float) -> Iterator[bytes]:
        """The lines that a piece of a process's output ends, without their ends."""
        before, _ = self._unfinished.pop(pid, (b"", 0.0))
        *lines, rest = (before + piece).split(b"\n")
        for line in lines:
            yield from _cut(line)
        *full, rest = _cut(rest) or [b""]
        yield from full
        if rest:
            self._unfinished[pid] = rest, now + UNFINISHED_SECONDS

    def given_up(self, now: float) -> Iterator[tuple[int, bytes]]:
        """The unfinished lines that were not continued for long, with their processes."""
        for pid, (line, until) in list(self._unfinished.items()):
            if until <= now:
                del self._unfinished[pid]
                yield pid, line

    def seconds_left(self, now: float) -> float | None:
        """In how many seconds to call `given_up`; None when nothing is unfinished."""
        if not self._unfinished:
            return None
        return max(0.0, min(until for _, until in self._unfinished.values()) - now)


def _cut(line: bytes) -> list[bytes]:
    """A line in pieces that are not too long, of whole characters; none of an empty one."""
    pieces = []
    while len(line) > LONGEST_LINE:
        end = LONGEST_LINE
        while end > LONGEST_LINE - 4 and line[end] & 0xC0 == 0x80:  # within a character of UTF-8
            end -= 1
        pieces.append(line[:end])
        line = line[end:]
    return [*pieces, line] if line else pieces


def pair() -> tuple[socket.socket, socket.socket]:
    """A new pair: the log process's end, and that of those who write. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def copy(source: socket.socket, write: Callable[[str], None]) -> None:
    """Be the log process: write what comes, to the end of file, or until a TERM.

    `write` is called with each line of the log.
    """
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    lines = Lines()
    going_on = True
    while going_on:
        left = lines.seconds_left(time.monotonic())
        ready = readable([source.fileno(), told.fileno()], left)
        if source.fileno() in ready:
            going_on = _copy_piece(source, lines, write)
        going_on = going_on and told.fileno() not in ready
        for pid, line in lines.given_up(time.monotonic() if going_on else math.inf):
            write(as_object(pid, line))


def _copy_piece(source: socket.socket, lines: Lines, write: Callable[[str], None]) -> bool:
    """Copy what one process has written; False at the end of file."""
    space = socket.CMSG_SPACE(_UCRED.size)
    piece, ancillary, _, _ = source.recvmsg(MOST, space, socket.MSG_PEEK)
    if not piece:
        return False
    pid = 0
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, _, _ = _UCRED.unpack(data)
    for line in lines.add(pid, piece, time.monotonic()):
        write(as_object(pid, line))  # one by one: a larger write may be cut when this is killed
    taken = 0
    while taken < len(piece):  # only now: see above
        taken += len(source.recv(len(piece) - taken))
    return True


def as_object(pid: int, line: bytes) -> str:
    """A line that a process has written, as a line of the log."""
    return json_line(
        {
            "timestamp": time.time(),
            "level": "INFO",
            "pid": pid,
            "message": line.decode("utf-8", "backslashreplace"),
            "source": "output",
        }
    )


def keep_only(*descriptors: int) -> None:
    """Close all others: the log process may outlive the daemon, whose locks and sockets they are.

    Standard input, output and error become /dev/null. Called in the log process, at first.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    begin = 3
    for kept in sorted(descriptors):
        os.closerange(begin, kept)
        begin = kept + 1
    os.closerange(begin, os.sysconf("SC_OPEN_MAX"))
