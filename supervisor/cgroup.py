"""What the kernel lets this process have: the limits of its control groups, versions 1 and 2.

A container, a systemd unit or a batch job may have less memory and fewer processors than the
machine. The kernel says so in the files of the process's control group (cgroup) and of those above
it: what any of them limits holds for the process, and it counts there together with all others
below. A group that a cgroup namespace hides, above the namespace's root, cannot be read; only
version 1's hierarchical_memory_limit includes it.

Which group a process is in, in each hierarchy, says /proc/self/cgroup; where a hierarchy is to be
found, and from which of its groups on, /proc/self/mountinfo. Version 2 and some hierarchies of
version 1 may be mounted at the same time (hybrid); a controller is in one of them. Limits may
change, and the process may be moved, while it runs: both are read anew each time. What is mounted
is read once.

Imports nothing of the project. Called in every process.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

_NO_LIMIT = 1 << 62  # version 1 has 2**63 - 4096 for that
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


class Memory(NamedTuple):
    """One group that limits memory. In bytes.

    `used` leaves out what the kernel takes back before it kills: the cache of files, and its own
    reclaimable objects. (The kubelet leaves out only the cache that was used once. What was used
    twice stays while nothing else needs the memory; a gate that was closed for it would stay
    closed.) Files of a tmpfs count, because only swapping would free them.
    """

    folder: str  # of the group
    limit: int
    used: int

    @property
    def share(self) -> int:
        """What the daemon may use of it: the rest is for what comes between two looks at it."""
        return self.limit * 9 // 10


class Processors(NamedTuple):
    """How many processors this process may use at a time."""

    affinity: int  # of its affinity mask, which includes that of its cpuset
    quota: float  # CPU time in a second, by the groups; math.inf: no limit
    folder: str  # of the group that sets the quota; "": none does

    @property
    def usable(self) -> float:
        """How many can be busy at a time."""
        return min(self.affinity, self.quota)


class Cgroups:
    """The groups of this process. `proc` is where procfs is mounted."""

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._mounts = list(_mounts(_read(f"{proc}/self/mountinfo")))

    def memory(self) -> list[Memory]:
        """The groups that limit memory, the process's own first."""
        version1, folders = self._folders("memory")
        found = map(_memory_of_version_1 if version1 else _memory_of_version_2, folders)
        return [each for each in found if each is not None]

    def processors(self) -> Processors:
        """How many processors there are for this process. `workers = 0` counts them."""
        version1, folders = self._folders("cpu")
        quota_of = _quota_of_version_1 if version1 else _quota_of_version_2
        quotas = [(quota, folder) for folder in folders if (quota := quota_of(folder)) < math.inf]
        quota, folder = min(quotas, default=(math.inf, ""))
        return Processors(len(os.sched_getaffinity(0)), quota, folder)

    def oom_kills(self) -> tuple[int, str]:
        """How many processes the kernel has killed for want of memory, and the file that says so.

        Those of the process's own group, wherever the limit was; or of the whole machine, where its
        group does not count them.
        """
        version1, folders = self._folders("memory")
        name = "memory.oom_control" if version1 else "memory.events"
        for file in (*(f"{folder}/{name}" for folder in folders), f"{self._proc}/vmstat"):
            kills = _numbers(file).get("oom_kill")
            if kills is not None:
                return kills, file
        return 0, ""

    def _folders(self, controller: str) -> tuple[bool, Sequence[str]]:
        """Whether a controller is version 1's, and the process's group and those above it."""
        groups = _groups(_read(f"{self._proc}/self/cgroup"))
        for version1, name in ((True, controller), (False, "")):
            if name in groups:
                for mount in self._mounts:
                    if mount.version1 is version1 and (not name or name in mount.options):
                        folders = mount.folders(groups[name])
                        if folders:
                            return version1, folders
        return False, ()


class _Mount(NamedTuple):
    """A mounted hierarchy."""

    version1: bool
    options: Sequence[str]  # of version 1: its controllers are among them
    root: str  # the group that is at `point`
    point: str

    def folders(self, group: str) -> list[str]:
        """The folders of a group and of those above it; none when it is not below this mount."""
        # "/.." is outside of the reader's cgroup namespace, and cannot be told from another one.
        if ".." in PurePosixPath(group).parts or ".." in PurePosixPath(self.root).parts:
            return []
        try:
            inside = PurePosixPath(group).relative_to(self.root)
        except ValueError:
            return []
        return [str(self.point / each) for each in (inside, *inside.parents)]


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    """The cgroup hierarchies of a mountinfo file, see proc_pid_mountinfo(5)."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, *source_and_options = after.split(" ")
        if kind in ("cgroup", "cgroup2"):
            root, point = map(_unescaped, before.split(" ")[3:5])
            yield _Mount(kind == "cgroup", source_and_options[-1].split(","), root, point)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _groups(text: str) -> dict[str, str]:
    """The process's group by controller, see cgroups(7); version 2's is that of ""."""
    groups = {}
    for line in text.splitlines():
        number, controllers, group = line.split(":", 2)
        for controller in controllers.split(",") if number != "0" else [""]:
            groups[controller] = group
    return groups


def _memory_of_version_2(folder: str) -> Memory | None:
    # Above memory.high the kernel slows the group's processes down until they hardly run.
    limit = min(_limit(f"{folder}/memory.{name}") for name in ("max", "high"))
    if limit >= _NO_LIMIT:
        return None
    stat = _numbers(f"{folder}/memory.stat")
    return Memory(folder, limit, _used(f"{folder}/memory.current", stat, ""))


def _memory_of_version_1(folder: str) -> Memory | None:
    stat = _numbers(f"{folder}/memory.stat")
    limit = stat.get("hierarchical_memory_limit", _NO_LIMIT)
    limit = min(limit, _limit(f"{folder}/memory.limit_in_bytes"))
    if limit >= _NO_LIMIT:
        return None
    return Memory(folder, limit, _used(f"{folder}/memory.usage_in_bytes", stat, "total_"))


def _used(file: str, stat: Mapping[str, int], prefix: str) -> int:
    reclaimable = sum(stat.get(f"{prefix}{name}", 0) for name in _RECLAIMABLE)
    return max(0, _number(_read(file), 0) - reclaimable)


def _quota_of_version_2(folder: str) -> float:
    quota, _, period = _read(f"{folder}/cpu.max").partition(" ")
    return _share(quota, period)


def _quota_of_version_1(folder: str) -> float:
    return _share(_read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float:
    """CPU seconds in a second. A quota of "max" or -1 is no limit."""
    time, every = _number(quota, -1), _number(period, 0)
    return time / every if time > 0 and every > 0 else math.inf


def _limit(file: str) -> int:
    return _number(_read(file), _NO_LIMIT)


def _number(text: str, otherwise: int) -> int:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else otherwise


def _numbers(file: str) -> dict[str, int]:
    """A file of lines with a name and a number."""
    lines = (line.split(" ") for line in _read(file).splitlines())
    return {line[0]: _number(line[1], 0) for line in lines if len(line) == 2}


def _read(file: str) -> str:
    """A file's text; "" where there is none, as in a hierarchy's root, or a group that is gone."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except OSError:
        return ""
