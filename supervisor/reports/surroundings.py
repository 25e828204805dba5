"""What the kernel lets the daemon have, in numbers and words: which limits were found, which hold.

Called in the master, in workers' client threads, and in the command.
"""

import math
from typing import Any

from cpanbridge.supervisor.cgroup import Cgroups
from cpanbridge.supervisor.memory.overload_state import MEGABYTE

Report = dict[str, Any]


def memory_limit(max_memory_mb: int, share_mb: float) -> Report:
    """The limit that holds: the configured one, or a cgroup's share; 0: none has a limit."""
    if 0 < share_mb < max_memory_mb:
        return {"mb": share_mb, "from": "cgroup"}
    return {"mb": max_memory_mb, "from": "configuration"}


def found() -> Report:
    """What limits this process besides the configuration; None for a cgroup that does not."""
    cgroups = Cgroups()
    groups, processors = cgroups.memory(), cgroups.processors()
    memory = quota = None
    if groups:
        tightest = min(groups, key=lambda each: each.limit)
        memory = {
            "limit_mb": tightest.limit / MEGABYTE,
            "share_mb": tightest.share / MEGABYTE,
            "used_mb": tightest.used / MEGABYTE,
            "path": tightest.folder,
        }
    if processors.quota < math.inf:
        quota = {"cores": processors.quota, "path": processors.folder}
    return {"cgroup_memory": memory, "cgroup_cpu": quota, "cpu_affinity": processors.affinity}


def memory_in_words(limit: Report, found: Report) -> str:
    """Which memory limit holds, and why."""
    group = found["cgroup_memory"]
    text = f"nine tenths of the {group['limit_mb']:.0f} MB of {group['path']}" if group else ""
    if limit["from"] == "cgroup" and group:
        return f"{limit['mb']:.0f} MB, {text}"
    text = f"{text} are more" if group else "no cgroup limits it"
    return f"{limit['mb']:.0f} MB, limits.max_memory_mb ({text})"


def processors_in_words(found: Report) -> str:
    """How many cores the daemon may use, and why."""
    affinity, quota = found["cpu_affinity"], found["cgroup_cpu"]
    text = f"{affinity} by the affinity mask"
    if quota is None:
        return f"{text} (no cgroup limits CPU time)"
    return f"{text}, {quota['cores']:g} by the CPU quota of {quota['path']}"
