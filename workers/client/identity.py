"""Which process a client is: its pid and start time, told by the kernel, and kept for a while.

Reading a process's start time costs as much as half a call. So the last clients are remembered
together with a pidfd, which tells for as long as it is open whether the pid is still the same
process's. Called from the threads that serve clients.
"""

import contextlib
import os
import select
import threading

from cpanbridge.supervisor.memory.owners import ClientProcess

REMEMBERED = 64  # processes, each with a descriptor


class _Known:
    """A process that was asked for lately."""

    def __init__(self, process: ClientProcess) -> None:
        self.process = process
        self._process = os.pidfd_open(process.pid)
        self._poll = select.poll()
        self._poll.register(self._process, select.POLLIN)

    def has_ended(self) -> bool:
        return bool(self._poll.poll(0))

    def forget(self) -> None:
        os.close(self._process)


class Identities:
    """One worker's memory of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, _Known] = {}

    def process(self, pid: int) -> ClientProcess | None:
        """The process that has this pid now; None when there is none."""
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
            # Without a descriptor for it, it is asked for again the next time.
            with contextlib.suppress(OSError):
                known = _Known(process)
                # The handle is of whoever has the pid now; the start time may have been another's.
                if start_time(pid) == start:
                    self._known[pid] = known
                else:
                    known.forget()
            return process


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None when there is none.

    Field 22 of proc_pid_stat(5). With the pid it tells a process for as long as the machine runs.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stream:
            stat = stream.read(4096)
    except OSError:
        return None
    return int(stat[stat.rindex(b")") + 2 :].split(None, 20)[19])
