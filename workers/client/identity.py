"""Which process a client is: its pid and start time, read from the kernel and cached.

Reading a process's start time costs as much as half a call. So the last processes are cached
together with a pidfd: while it is open, it tells whether the pid still belongs to the same process.
Called from the threads that serve clients.
"""

import contextlib
import os
import select
import threading

from cpanbridge.supervisor.memory.owners import ClientProcess

REMEMBERED = 64  # processes in the cache, each with a descriptor


class _Known:
    """A cached process."""

    def __init__(self, process: ClientProcess) -> None:
        self.process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)

    def has_ended(self) -> bool:
        return bool(self._poll.poll(0))

    def forget(self) -> None:
        os.close(self._pidfd)


class Identities:
    """One worker's cache of client processes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, _Known] = {}

    def process(self, pid: int) -> ClientProcess | None:
        """The process that has this pid now; None when no process has."""
        with self._lock:
            known = self._known.get(pid)
            if known is not None and not known.has_ended():
                return known.process
            if known is not None:
                self._known.pop(pid).forget()
            elif len(self._known) >= REMEMBERED:
                self._known.pop(next(iter(self._known))).forget()
            start = start_time(pid)
            if start is None:
                return None
            process = ClientProcess(pid, start)
            # Without a pidfd it is not cached.
            with contextlib.suppress(OSError):
                known = _Known(process)
                # The pidfd may be of a later process with this pid than the start time is.
                if start_time(pid) == start:
                    self._known[pid] = known
                else:
                    known.forget()
            return process


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process.

    Field 22 of proc_pid_stat(5). Pid and start time together identify a process until the next
    boot.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stream:
            stat = stream.read(4096)
    except OSError:
        return None
    return int(stat[stat.rindex(b")") + 2 :].split(None, 20)[19])
