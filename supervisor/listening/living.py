"""Whether a living master serves a path although its files are gone.

A master has its control socket open as long as it lives, and no process that it forks has a copy. A
socket keeps the name that it was bound to when its file is removed or replaced, and the kernel
lists it. Called before a lock is believed to be free, for lock files can be removed too.
"""

import contextlib
import os
from collections.abc import Iterator

from cpanbridge.supervisor.listening.listener import CONTROL, answers

_LISTENS = 0x10000  # __SO_ACCEPTCON: the flag of a listening socket in /proc/net/unix, see proc(5)


def has_master(path: str) -> bool:
    """Whether another, living master serves this path, as far as this process may see."""
    control = path + CONTROL
    return answers(control) or any(map(_is_held_here, _bound_to(control)))


def _bound_to(control: str) -> Iterator[str]:
    """The numbers of listening sockets that were bound to this path, whatever its file is now.

    They may be those of processes for which the path means another file.
    """
    folder, name = os.path.split(control)
    with contextlib.suppress(OSError), open("/proc/net/unix", "rb") as table:
        for line in table:
            fields = line.rstrip(b"\n").split(maxsplit=7)
            bound = os.fsdecode(fields[7]) if len(fields) == 8 else ""
            if os.path.basename(bound) == name and int(fields[3], 16) & _LISTENS:
                with contextlib.suppress(OSError):
                    if os.path.samefile(os.path.dirname(bound), folder):
                        yield os.fsdecode(fields[6])


def _is_held_here(number: str) -> bool:
    """Whether another process that sees the same files as this one has the socket open.

    Other users' are not asked: theirs was bound where the path means a file of their own.
    """
    here, me = _root_of("self"), str(os.getpid())
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        # Ended meanwhile, or not this user's to look into.
        with contextlib.suppress(OSError):
            if pid == me or _root_of(pid) != here or _user_of(pid) not in (0, os.getuid()):
                continue
            if _has_open(pid, f"socket:[{number}]"):
                return True
    return False


def _user_of(pid: str) -> int:
    """Not by who owns the folder: that is root where a process has made itself undumpable."""
    with open(f"/proc/{pid}/status", "rb") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(b"Uid:"))


def _root_of(pid: str) -> tuple[str, str]:
    return os.readlink(f"/proc/{pid}/ns/mnt"), os.readlink(f"/proc/{pid}/root")


def _has_open(pid: str, file: str) -> bool:
    folder = f"/proc/{pid}/fd"
    for descriptor in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(f"{folder}/{descriptor}") == file:
                return True
    return False
