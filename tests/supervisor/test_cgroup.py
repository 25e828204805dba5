"""The limits of control groups, from trees of files as the kernel lays them out."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cpanbridge.supervisor.cgroup import Cgroups, Memory

MB = 1 << 20
UNLIMITED = str(2**63 - 4096)  # as version 1 says it

# A machine: what its files say, by their paths; "{}" in a text is the machine's root.
Machine = Callable[[dict[str, str]], Cgroups]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    def lay_out(files: dict[str, str]) -> Cgroups:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("{}", str(tmp_path)))
        return Cgroups(str(tmp_path / "proc"))

    return lay_out


def version_2(groups: str, root: str = "/") -> dict[str, str]:
    """A machine with version 2 alone; `groups` is the process's group."""
    line = f"30 23 0:26 {root} {{}}/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    return {
        "proc/self/mountinfo": f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n{line}",
        "proc/self/cgroup": f"0::{groups}\n",
    }


def version_1(group: str, root: str = "/", controllers: str = "cpu,cpuacct") -> dict[str, str]:
    """A hybrid machine: memory and CPU are version 1's."""
    mounts = {"memory": "memory", controllers: "cpu,cpuacct"}
    lines = [
        f"3{n} 23 0:2{n} {root} {{}}/cg/{folder} rw shared:{n} - cgroup cgroup rw,{options}\n"
        for n, (folder, options) in enumerate(mounts.items())
    ]
    lines.append("41 31 0:38 / {}/cg/unified rw - cgroup2 cgroup2 rw\n")
    return {
        "proc/self/mountinfo": "".join(lines),
        "proc/self/cgroup": f"5:memory:{group}\n2:cpu,cpuacct:{group}\n1:name=systemd:/x\n0::/x\n",
    }


def lines_of(stat: Mapping[str, int] | None) -> str:
    return "".join(f"{name} {value * MB}\n" for name, value in (stat or {}).items())


def memory_2(
    limit: str, used: int = 0, high: str = "max", stat: Mapping[str, int] | None = None
) -> dict[str, str]:
    limits = {"memory.max": limit, "memory.high": high}
    return {
        **limits,
        "memory.current": f"{used * MB}\n",
        "memory.stat": f"anon 1\n{lines_of(stat)}",
    }


def memory_1(
    limit: str, used: int, hierarchical: str = UNLIMITED, stat: Mapping[str, int] | None = None
) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used * MB}\n",
        "memory.stat": f"cache 1\nhierarchical_memory_limit {hierarchical}\n{lines_of(stat)}",
    }


def at(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def found(cgroups: Cgroups, tmp_path: Path) -> list[tuple[str, int, int]]:
    """What limits memory: folders as in the machine, megabytes."""
    return [
        (str(Path(folder).relative_to(tmp_path)), limit // MB, used // MB)
        for folder, limit, used in cgroups.memory()
    ]


def test_groups_above_the_own_one_limit_it_as_well(machine: Machine, tmp_path: Path) -> None:
    cgroups = machine(
        version_2("/app.slice/d.service")
        | at("cg/app.slice/d.service", memory_2("max", 100))
        | at("cg/app.slice", memory_2(f"{500 * MB}\n", 300))
        | at("cg", {"cgroup.controllers": "memory"})  # the root has no limit
    )
    assert found(cgroups, tmp_path) == [("cg/app.slice", 500, 300)]


def test_limits_and_groups_are_read_anew(machine: Machine, tmp_path: Path) -> None:
    files = version_2("/a") | at("cg/a", memory_2("max"))
    cgroups = machine(files)
    assert found(cgroups, tmp_path) == []
    (tmp_path / "cg/a/memory.max").write_text(str(64 * MB))
    assert found(cgroups, tmp_path) == [("cg/a", 64, 0)]
    machine(version_2("/b") | at("cg/b", memory_2(str(32 * MB))))
    assert found(cgroups, tmp_path) == [("cg/b", 32, 0)]
    (tmp_path / "cg/b/memory.max").unlink()  # the group is gone
    (tmp_path / "cg/b/memory.high").unlink()
    assert found(cgroups, tmp_path) == []


def test_what_slows_the_group_down_is_a_limit(machine: Machine, tmp_path: Path) -> None:
    cgroups = machine(version_2("/a") | at("cg/a", memory_2(str(300 * MB), 9, str(200 * MB))))
    assert found(cgroups, tmp_path) == [("cg/a", 200, 9)]


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_kernel_can_take_back_does_not_count(
    machine: Machine, tmp_path: Path, version: int
) -> None:
    """A gate that is closed for files which are only cached would never open."""
    limit = str(200 * MB)
    if version == 1:
        caches = {"total_inactive_file": 30, "total_active_file": 100, "active_file": 7}
        files = version_1("/a") | at("cg/memory/a", memory_1(limit, 190, stat=caches))
    else:
        caches = {"inactive_file": 30, "active_file": 90, "slab_reclaimable": 10, "shmem": 20}
        files = version_2("/a") | at("cg/a", memory_2(limit, 190, stat=caches))
    (group,) = found(machine(files), tmp_path)
    assert group[1:] == (200, 60)


def test_version_1_tells_the_limit_of_a_group_that_cannot_be_seen(
    machine: Machine, tmp_path: Path
) -> None:
    files = version_1("/docker/abc", root="/docker/abc")
    files |= at("cg/memory", memory_1(UNLIMITED, 40, hierarchical=str(100 * MB)))
    assert found(machine(files), tmp_path) == [("cg/memory", 100, 40)]
    assert machine(at("cg/memory", memory_1(UNLIMITED, 40))).memory() == []


def test_a_mount_is_found_by_its_own_root_and_name(machine: Machine, tmp_path: Path) -> None:
    """A bind mount in a container shows a part of the hierarchy; spaces are escaped."""
    files = version_2("/pods/p/c", root="/pods/p")
    files["proc/self/mountinfo"] = files["proc/self/mountinfo"].replace("/cg ", "/my\\040cg ")
    cgroups = machine(files | at("my cg/c", memory_2(str(8 * MB))))
    assert found(cgroups, tmp_path) == [("my cg/c", 8, 0)]


@pytest.mark.parametrize(
    ("group", "root"),
    [("/../x", "/"), ("/", "/../.."), ("/other", "/pods/p"), ("/pods/pp", "/pods/p")],
)
def test_a_group_outside_of_what_is_mounted_is_not_mistaken_for_another(
    machine: Machine, group: str, root: str
) -> None:
    files = version_2(group, root) | at("cg", memory_2(str(8 * MB))) | at("x", memory_2("9"))
    assert machine(files).memory() == []


def test_without_any_cgroup_there_is_no_limit(machine: Machine) -> None:
    cgroups = machine({"proc/vmstat": "pgfault 3\noom_kill 2\n"})
    assert cgroups.memory() == []
    assert cgroups.processors().quota == math.inf
    assert cgroups.oom_kills()[0] == 2


def test_this_machine_can_be_read() -> None:
    cgroups = Cgroups()
    assert all(isinstance(each, Memory) and each.limit > 0 for each in cgroups.memory())
    assert 0 < cgroups.processors().usable <= (os.cpu_count() or 1)
    assert cgroups.oom_kills()[0] >= 0


# -- processors --


@pytest.mark.parametrize(
    ("own", "above", "cores"),
    [
        ("max 100000", "max 100000", 8),
        ("150000 100000", "max 100000", 1.5),
        ("150000 100000", "50000 100000", 0.5),
        ("1600000 100000", "max 100000", 8),
    ],
)
def test_the_lowest_quota_and_the_affinity_mask_count(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, own: str, above: str, cores: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    groups = {"cg/a/b/cpu.max": f"{own}\n", "cg/a/cpu.max": f"{above}\n"}
    assert machine(version_2("/a/b") | groups).processors().usable == cores


def test_version_1_has_quotas_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cpu = "cg/cpu,cpuacct"
    files = version_1("/a")
    files |= {f"{cpu}/a/cpu.cfs_quota_us": "-1\n", f"{cpu}/a/cpu.cfs_period_us": "100000\n"}
    files |= {f"{cpu}/cpu.cfs_quota_us": "250000\n", f"{cpu}/cpu.cfs_period_us": "100000\n"}
    processors = machine(files).processors()
    assert (processors.usable, processors.affinity) == (2.5, 8)
    assert processors.folder.endswith(cpu)


# -- what the kernel has killed --


def test_kills_are_counted_where_the_process_is(machine: Machine) -> None:
    machine_wide = {"proc/vmstat": "oom_kill 9\n"}
    events = {"memory.events": "low 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"}
    kills, file = machine(version_2("/a") | at("cg/a", events) | machine_wide).oom_kills()
    assert kills == 2
    assert file.endswith("cg/a/memory.events")
    control = {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}
    kills, file = machine(version_1("/a") | at("cg/memory/a", control) | machine_wide).oom_kills()
    assert kills == 4
    assert file.endswith("cg/memory/a/memory.oom_control")
