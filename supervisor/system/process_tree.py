"""The memory and CPU of a whole tree of processes: the master, its workers, all they started.

Memory is PSS, which counts a page that n processes share as 1/n in each, so that the sum is what
the tree takes from the machine. Reading it costs the kernel a walk through the process's pages,
2 ms for 200 MB. So it is read of new processes and of the parents with which they share pages.
Of the others it is read when their RSS has changed, which costs nothing to read, or when it was
last read long ago: the oldest first, for no more than `PSS_SHARE` of the time. Until then the
growth of its RSS is added. Where PSS cannot be read (another user's process, or one that is not
dumpable) a process counts with its RSS.

CPU is the time that all processes have used between two samples. A process that has ended meanwhile
is included: the kernel adds its time to its parent's when the parent waits for it.

The tree is found through the kernel's lists of children. The master is a subreaper
(PR_SET_CHILD_SUBREAPER), so a process stays in the tree when its parent ends. A process that was
once found is looked up until it has ended, because the lists may miss one while its siblings end.

A process that ends during a sample counts as ended. One that the kernel hides (/proc mounted with
hidepid) is not counted. A large tree is sampled in many short steps, so that the master can do
other things between them. Called in the master.
"""

import contextlib
import ctypes
import math
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import psutil

PSS_SHARE = 0.01  # of the time between two samples
PSS_SECONDS = 10.0  # sharing with others may change while the RSS stays as it is
NEVER = -math.inf
_PR_SET_CHILD_SUBREAPER = 36


class Usage(NamedTuple):
    """The result of a sample."""

    seconds: float  # since the one before
    cpu_seconds: float  # used meanwhile by all
    memory: int  # bytes
    by_root: dict[int, int]  # bytes of each root, with all below it
    orphans: dict[int, int]  # bytes of each process that was below a root which has ended
    processes: int
    by_rss: int  # of these, those whose PSS cannot be read


@dataclass
class _Process:
    """A process of the tree."""

    handle: psutil.Process  # equal to another one when pid and start time are
    parent: int = 0
    own: float = 0.0  # CPU seconds
    waited: float = 0.0  # CPU seconds of the descendants that were waited for
    rss: int = 0
    pss: int | None = None  # None: not read yet, or not to be read
    rss_then: int = 0  # RSS when PSS was read
    ended: bool = False  # but its parent has not waited for it yet
    had_root: bool = False  # it was below one of the roots
    read_at: float = NEVER  # CLOCK_MONOTONIC seconds
    readable: bool = True

    @property
    def memory(self) -> int:
        if self.pss is None:
            return self.rss
        return max(0, self.pss + self.rss - self.rss_then)

    def read_pss(self) -> None:
        try:
            self.pss = self.handle.memory_full_info().pss
            self.rss_then = self.rss
        except psutil.AccessDenied:
            self.readable, self.pss = False, None
        except psutil.NoSuchProcess:
            pass  # it has ended: the next sample will not find it


def inherit_orphans() -> None:
    """Become a subreaper: the parent of descendants whose own parent ends. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Tree:
    """The tree below one process, sampled again and again."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._known: dict[int, _Process] = {}
        self._owed = 0.0  # CPU seconds of ended processes that no parent had yet (see _cpu_used)
        self._sampled_at = time.monotonic()
        self.usage: Usage  # the result of the last sample

    def steps(self, roots: Collection[int]) -> Iterator[None]:
        """Take a sample, one process a step; at the end `usage` is its result.

        `roots` are the pids whose memory is wanted separately. They belong to the tree even when
        they are no children in it: after an upgrade the workers of the old master are not the new
        one's. Raises OSError when the system has no descriptor or no memory for it.
        """
        now = time.monotonic()
        before, found = self._known, dict[int, _Process]()
        for process in self._find(before, roots):
            found[process.handle.pid] = process
            yield
        self._known = found
        seconds, self._sampled_at = now - self._sampled_at, now
        used = self._cpu_used(before)
        yield from self._read_pss(seconds)
        self.usage = self._added_up(seconds, used, roots)

    def end(self, pid: int, number: signal.Signals) -> str | None:
        """Send a signal to a process of the tree; its name, or None when it has ended."""
        try:
            handle = self._known[pid].handle
            name = str(handle.name())
            handle.send_signal(number)
        except (KeyError, psutil.Error):
            return None
        return name

    def _added_up(self, seconds: float, used: float, roots: Collection[int]) -> Usage:
        by_root = dict.fromkeys(roots, 0)
        orphans = {}
        for pid, process in self._known.items():
            root = self._root_of(process, roots)
            if root is not None:
                process.had_root = True
                by_root[root] += process.memory
            elif process.had_root and not process.ended:
                orphans[pid] = process.memory
        return Usage(
            seconds=seconds,
            cpu_seconds=used,
            memory=sum(process.memory for process in self._known.values()),
            by_root=by_root,
            orphans=orphans,
            processes=sum(not process.ended for process in self._known.values()),
            by_rss=sum(not process.readable for process in self._known.values()),
        )

    def _find(self, before: dict[int, _Process], roots: Collection[int]) -> Iterator[_Process]:
        """All processes of the tree, each with its current numbers; parents first."""
        pending, seen = [self._root, *roots, *before], set[int]()
        while pending:
            pid = pending.pop(0)
            if pid in seen:
                continue
            seen.add(pid)
            process = _measured(pid, before.get(pid))
            if process is not None:
                yield process
                pending.extend(_children(pid))

    def _cpu_used(self, before: dict[int, _Process]) -> float:
        """CPU seconds since the last sample.

        That is what the living have used themselves, plus what the parents got of ended children
        (all that a child ever used), less what was counted of these before. A process that ended
        after its parent was measured is missing already, while its parent has its time only in the
        next sample: until then the difference is owed.
        """
        used = inherited = 0.0
        for pid, process in self._known.items():
            if old := before.get(pid):
                used += process.own - old.own
                inherited += process.waited - old.waited
            elif before:
                used += process.own  # new
                inherited += process.waited
        gone = (old for pid, old in before.items() if pid not in self._known)
        inherited -= sum(old.own + old.waited for old in gone)
        owed, self._owed = self._owed, max(0.0, -inherited)
        return max(0.0, used) + max(0.0, inherited - owed)

    def _read_pss(self, seconds: float) -> Iterator[None]:
        """Read PSS of the new processes and their parents, and of others as time allows."""
        for process in self._known.values():
            if process.read_at == NEVER and process.parent in self._known:
                self._known[process.parent].read_at = NEVER
        now = time.monotonic()
        for process in sorted(self._known.values(), key=lambda each: each.read_at):
            if process.read_at != NEVER and time.monotonic() > now + PSS_SHARE * seconds:
                return
            if process.rss == process.rss_then and now < process.read_at + PSS_SECONDS:
                continue
            process.read_at = time.monotonic()
            if process.readable:
                process.read_pss()
                yield

    def _root_of(self, process: _Process, roots: Collection[int]) -> int | None:
        """The nearest of `roots` above a process, or the process itself."""
        pid = process.handle.pid
        for _ in self._known:  # no further up than there are processes
            if pid in roots:
                return pid
            if pid not in self._known:
                return None
            pid = self._known[pid].parent
        return None


def _measured(pid: int, old: _Process | None) -> _Process | None:
    """A process with its current numbers; None when it has ended or its pid is another's."""
    try:
        handle = psutil.Process(pid)
        if old is not None and handle != old.handle:
            return None  # the pid was reused by a process outside the tree
        with handle.oneshot():
            times = handle.cpu_times()
            return replace(
                old or _Process(handle),
                handle=handle,
                parent=handle.ppid(),
                own=times.user + times.system,
                waited=times.children_user + times.children_system,
                rss=handle.memory_info().rss,
                ended=handle.status() == psutil.STATUS_ZOMBIE,
            )
    except psutil.Error:
        return None


def _children(pid: int) -> Iterator[int]:
    """The children of all threads of a process.

    psutil's `children` reads every process of the host in one step: with 600 of them 10 ms, where
    these lists of a master and two workers take 0.2.
    """
    # It has ended, or its files may not be read.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as stream:
                yield from map(int, stream.read().split())
