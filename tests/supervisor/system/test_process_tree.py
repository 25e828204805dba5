"""The tree's memory and CPU, measured on real processes that hold, burn, fork and end on command.

CPU is compared with what the processes say of themselves (getrusage(2)), not with what they were to
use: forking and ending cost processor time as well, and more on a busy machine.
"""

import contextlib
import ctypes
import itertools
import json
import os
import resource
import signal
import socket
import time
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import psutil
import pytest

from cpanbridge.supervisor.system import process_tree
from cpanbridge.supervisor.system.process_tree import Usage, inherit_orphans

MB = 1 << 20
TICK = 1 / os.sysconf("SC_CLK_TCK")  # proc(5) rounds each CPU time down to that many seconds
PR_SET_DUMPABLE = 4
PR_SET_PDEATHSIG = 1


class Tree(process_tree.Tree):
    """One whose samples are taken in one go."""

    def sample(self, roots: Collection[int]) -> Usage:
        for _ in self.steps(roots):
            pass
        return self.usage


def prctl(option: int, value: int) -> None:
    assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def sleep_until_the_parent_ends(parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    while os.getppid() == parent:
        signal.pause()


class ControlledProcess:
    """A process that executes commands: a child of the test, or of another one."""

    def __init__(self, parent: "ControlledProcess | None" = None) -> None:
        self._commands, theirs = socket.socketpair()
        self._commands.settimeout(60)
        if parent is None:
            self.pid = os.fork()
            if self.pid == 0:
                _execute_commands(theirs)
        else:
            self.pid = int(parent.ask("fork", descriptor=theirs.fileno()))
        theirs.close()

    def ask(self, what: str, argument: float = 0, *, descriptor: int | None = None) -> float:
        """Have it execute a command; returns the result."""
        descriptors = [] if descriptor is None else [descriptor]
        socket.send_fds(self._commands, [json.dumps([what, argument]).encode()], descriptors)
        result: float = json.loads(self._commands.recv(100))
        return result

    @property
    def cpu(self) -> float:
        """Its CPU seconds, and those of the children that it has waited for."""
        return self.ask("cpu")

    def hold(self, megabytes: int) -> None:
        """Allocate so much memory."""
        self.ask("hold", megabytes)

    def burn(self, seconds: float) -> None:
        """Use so much CPU time."""
        self.ask("burn", seconds)

    def end(self, reaper: "ControlledProcess | None" = None) -> None:
        """End, and be waited for by its parent."""
        os.kill(self.pid, signal.SIGKILL)
        if reaper is None:
            os.waitpid(self.pid, 0)
        else:
            reaper.ask("reap", self.pid)


def cpu_of_this_process() -> float:
    """Its CPU seconds, and those of the children that it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def _execute_commands(commands: socket.socket) -> None:
    """The other side of ControlledProcess; never returns."""
    status = 1
    with contextlib.suppress(BaseException):
        held = []
        while True:
            message, descriptors, *_ = socket.recv_fds(commands, 100, 1)
            if not message:
                break
            what, argument = json.loads(message)
            result = 0.0
            if what == "hold":
                held.append(b"x" * (argument * MB))
            elif what == "let go":
                held.clear()
            elif what == "burn":
                burn(argument)
            elif what == "cpu":
                result = cpu_of_this_process()
            elif what == "fork":
                result = os.fork()
                if result == 0:
                    commands = socket.socket(fileno=descriptors[0])
                    continue
                os.close(descriptors[0])
            elif what == "fork sleepers":
                parent = os.getpid()
                for _ in range(argument):
                    if os.fork() == 0:
                        sleep_until_the_parent_ends(parent)
                        os._exit(0)
            elif what == "reap":
                os.waitpid(argument, 0)
            commands.send(json.dumps(result).encode())
        status = 0
    os._exit(status)


NewProcess = Callable[..., ControlledProcess]


@pytest.fixture
def new_process() -> Iterator[NewProcess]:
    processes: list[ControlledProcess] = []

    def make(parent: ControlledProcess | None = None) -> ControlledProcess:
        processes.append(ControlledProcess(parent))
        return processes[-1]

    yield make
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def in_a_child_process(work: Callable[[], object]) -> Any:
    """The result of `work` in a forked child, as JSON."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            message = [work()]
        except BaseException as error:
            message = [repr(error), "failed"]
        os.write(write_end, json.dumps(message).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        message = json.loads(pipe.read())
    os.waitpid(pid, 0)
    assert len(message) == 1, message
    return message[0]


# -- memory --


def test_memory_is_what_a_process_holds(new_process: NewProcess) -> None:
    root = new_process()
    child = new_process(root)
    tree = Tree(root.pid)
    before = tree.sample([child.pid])
    child.hold(64)
    after = tree.sample([child.pid])
    for grown in (
        after.memory - before.memory,
        after.by_root[child.pid] - before.by_root[child.pid],
    ):
        assert 60 * MB < grown < 72 * MB
    assert (after.processes, after.by_rss) == (2, 0)
    child.ask("let go")
    given_back = tree.sample([child.pid])
    assert given_back.memory < after.memory - 56 * MB


def test_a_new_process_is_measured_in_its_first_sample(new_process: NewProcess) -> None:
    root = new_process()
    tree = Tree(root.pid)
    tree.sample([])
    child = new_process(root)
    child.hold(64)
    assert tree.sample([child.pid]).by_root[child.pid] > 60 * MB


@pytest.mark.parametrize("uptime", [5, 10**6])
def test_memory_that_processes_share_after_a_fork_is_counted_once(
    new_process: NewProcess, monkeypatch: pytest.MonkeyPatch, uptime: float
) -> None:
    booted = time.monotonic() - uptime
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() - booted)
    monkeypatch.setattr(process_tree, "time", clock)

    def five(megabytes: int) -> tuple[Tree, list[int]]:
        root = new_process()
        root.hold(megabytes)
        tree = Tree(root.pid)
        tree.sample([])
        children = [new_process(root).pid for _ in range(4)]
        for pid in children:
            assert psutil.Process(pid).memory_info().rss > megabytes * MB
        return tree, children

    # What each fork has of the tests' own memory is in both.
    trees = [five(megabytes) for megabytes in (1, 64)]
    without, with_it = (tree.sample(children) for tree, children in trees)
    assert 55 * MB < with_it.memory - without.memory < 100 * MB
    for has_less, has_more in zip(without.by_root.values(), with_it.by_root.values(), strict=True):
        assert has_more - has_less < 64 * MB // 2


def test_descendants_count_with_their_worker(new_process: NewProcess) -> None:
    root = new_process()
    worker, other = new_process(root), new_process(root)
    grandchild = new_process(worker)
    great_grandchild = new_process(grandchild)
    tree = Tree(root.pid)
    before = tree.sample([worker.pid, other.pid])
    grandchild.hold(32)
    great_grandchild.hold(32)
    after = tree.sample([worker.pid, other.pid])
    assert after.by_root[worker.pid] - before.by_root[worker.pid] > 60 * MB
    assert after.by_root[other.pid] - before.by_root[other.pid] < 8 * MB
    assert after.processes == 5
    # Each process counts with the nearest root.
    nearest = tree.sample([worker.pid, grandchild.pid])
    assert nearest.by_root[grandchild.pid] > 60 * MB
    assert nearest.by_root[worker.pid] < nearest.by_root[grandchild.pid]
    assert nearest.by_root[worker.pid] + nearest.by_root[grandchild.pid] < nearest.memory


def test_growth_counts_at_once_though_pss_is_not_read_again(
    new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_process()
    child = new_process(root)
    tree = Tree(root.pid)
    before = tree.sample([child.pid])
    monkeypatch.setattr(process_tree._Process, "read_pss", lambda self: None)
    child.hold(64)
    after = tree.sample([child.pid])
    assert 60 * MB < after.by_root[child.pid] - before.by_root[child.pid] < 72 * MB


def test_pss_is_read_for_a_small_share_of_the_time_and_in_turn(
    new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_process()
    root.ask("fork sleepers", 9)
    tree = Tree(root.pid)
    read: list[int] = []
    read_pss = process_tree._Process.read_pss

    def read_and_note(process: Any) -> None:
        read.append(process.handle.pid)
        read_pss(process)
        time.sleep(0.02)  # as with much memory

    monkeypatch.setattr(process_tree._Process, "read_pss", read_and_note)
    tree.sample([])
    first = set(read)
    assert len(read) == len(first) == 10  # all are new
    read.clear()
    order: list[int] = []
    monkeypatch.setattr(process_tree, "PSS_SECONDS", 0.0)
    while len(set(order)) < 10:
        time.sleep(0.02)
        tree.sample([])
        order += read
        assert len(read) < 10  # never all at once
        read.clear()
    assert len(set(order[:10])) == 10  # none twice before each was read once


# -- the tree --


def test_60_grandchildren_are_found(new_process: NewProcess) -> None:
    root = new_process()
    workers = [new_process(root) for _ in range(4)]
    tree = Tree(root.pid)
    assert tree.sample([]).processes == 5
    for worker in workers:
        worker.ask("fork sleepers", 15)
    usage = tree.sample([worker.pid for worker in workers])
    assert usage.processes == 65
    assert all(usage.by_root[worker.pid] > 0 for worker in workers)
    assert sum(usage.by_root.values()) < usage.memory
    for worker in workers[1:]:
        worker.end(root)  # its children end with it
    usage = tree.sample([worker.pid for worker in workers])
    assert usage.by_root[workers[0].pid] > 0
    assert [usage.by_root[worker.pid] for worker in workers[1:]] == [0, 0, 0]


def test_a_process_that_has_ended_holds_nothing(new_process: NewProcess) -> None:
    root = new_process()
    child = new_process(root)
    child.hold(64)
    tree = Tree(root.pid)
    before = tree.sample([child.pid])
    os.kill(child.pid, signal.SIGKILL)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    zombie = tree.sample([child.pid])  # not waited for yet: it holds nothing
    assert zombie.by_root[child.pid] == 0
    assert zombie.memory < before.memory - 60 * MB
    root.ask("reap", child.pid)
    after = tree.sample([child.pid])
    assert after.by_root[child.pid] == 0
    assert after.processes == 1


def test_a_tree_whose_root_has_ended_is_empty(new_process: NewProcess) -> None:
    root = new_process()
    tree = Tree(root.pid)
    tree.sample([])
    root.end()
    usage = tree.sample([root.pid])
    assert (usage.processes, usage.memory, usage.by_root) == (0, 0, {root.pid: 0})


@pytest.mark.parametrize("moment", ["_measured", "_children", "read_pss"])
@pytest.mark.parametrize("first", [True, False], ids=["new", "known"])
def test_a_child_that_ends_during_a_sample_counts_as_ended(
    new_process: NewProcess, monkeypatch: pytest.MonkeyPatch, moment: str, first: bool
) -> None:
    """Killed and waited for just before its numbers, its children, or its memory are read."""
    root = new_process()
    child, other = new_process(root), new_process(root)
    child.burn(0.3)
    tree = Tree(root.pid)
    before = root.cpu + other.cpu
    if not first:
        tree.sample([])
        before += child.cpu  # is known, and not to be counted again
    owner = process_tree._Process if moment == "read_pss" else process_tree
    measure = getattr(owner, moment)
    killed: list[int] = []

    def kill_and_measure(who: Any, *rest: Any) -> Any:
        pid = who if isinstance(who, int) else who.handle.pid
        if pid == child.pid and not killed:
            killed.append(pid)
            child.end(root)
        return measure(who, *rest)

    monkeypatch.setattr(owner, moment, kill_and_measure)
    with monkeypatch.context() as patched:
        patched.setattr(process_tree, "PSS_SHARE", 1e9)
        patched.setattr(process_tree, "PSS_SECONDS", -1.0)
        usages = [tree.sample([child.pid, other.pid])]
    assert killed
    assert usages[0].by_root[other.pid] > 0
    usages += [tree.sample([child.pid, other.pid]) for _ in range(3)]
    for usage in usages[1:]:
        assert (usage.processes, usage.by_root[child.pid]) == (2, 0)
    # Its time is counted once at most, and not if an earlier sample had it.
    counted = sum(usage.cpu_seconds for usage in usages)
    assert counted < root.cpu + other.cpu - before + rounding(3)


def test_a_hidden_process_is_not_counted(
    new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with /proc mounted with hidepid."""
    root = new_process()
    hidden, seen = new_process(root), new_process(root)

    class Hiding(psutil.Process):
        def __init__(self, pid: int) -> None:
            if pid == hidden.pid:
                raise psutil.AccessDenied(pid)
            super().__init__(pid)

    monkeypatch.setattr(psutil, "Process", Hiding)
    usage = Tree(root.pid).sample([hidden.pid, seen.pid])
    assert usage.processes == 2
    assert usage.by_root[hidden.pid] == 0 < usage.by_root[seen.pid]


def test_a_process_outside_the_tree_with_a_reused_pid_is_not_counted(
    new_process: NewProcess,
) -> None:
    root, stranger = new_process(), new_process()
    child = new_process(root)
    stranger.hold(64)
    stranger.burn(0.3)
    tree = Tree(root.pid)
    cpu_before = root.cpu
    before = tree.sample([])
    child.end(root)
    tree._known[stranger.pid] = tree._known.pop(child.pid)  # as if it had got the child's pid
    after = tree.sample([stranger.pid])
    assert after.processes == 1
    assert after.by_root[stranger.pid] == 0
    assert after.memory < before.memory + 8 * MB
    assert after.cpu_seconds < root.cpu - cpu_before + rounding(2) < stranger.cpu


def test_a_child_with_a_reused_pid_is_found(
    new_process: NewProcess,
) -> None:
    root = new_process()
    ended, child = new_process(root), new_process(root)
    tree = Tree(root.pid)
    tree.sample([])
    ended.end(root)
    tree._known[child.pid] = tree._known.pop(ended.pid)
    tree.sample([])
    assert tree.sample([child.pid]).by_root[child.pid] > 0


def unreadable_memory() -> list[int]:
    """Called in a child process: another user than root measures one that is not dumpable."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    prctl(PR_SET_DUMPABLE, 1)  # setuid(2) has cleared it
    pids = []
    for dumpable in (0, 1):
        read_end, write_end = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            prctl(PR_SET_DUMPABLE, dumpable)
            held = b"x" * (64 * MB)
            os.write(write_end, held[:1])
            sleep_until_the_parent_ends(parent)
            os._exit(0)
        os.read(read_end, 1)
        pids.append(pid)
    usage = Tree(os.getpid()).sample(pids)
    rss = psutil.Process(pids[0]).memory_info().rss
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [usage.by_rss, usage.processes, rss, *(usage.by_root[pid] for pid in pids)]


def test_where_pss_cannot_be_read_a_process_counts_with_its_rss() -> None:
    by_rss, processes, rss, unreadable, readable = in_a_child_process(unreadable_memory)
    assert (by_rss, processes) == (1, 3)
    assert unreadable == pytest.approx(rss, abs=4 * MB)
    assert 64 * MB < readable < unreadable  # shared pages count in part


def test_a_sample_without_descriptors_is_an_error_and_the_next_one_goes_on(
    new_process: NewProcess,
) -> None:
    root = new_process()
    child = new_process(root)
    tree = Tree(root.pid)
    before = tree.sample([child.pid])
    with exhausted(), pytest.raises(OSError, match="Too many open files"):
        tree.sample([child.pid])
    after = tree.sample([child.pid])
    assert after.processes == before.processes == 2


@contextlib.contextmanager
def exhausted() -> Iterator[None]:
    """No file descriptor is left meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # `free` was the lowest
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# -- CPU --


def used(tree: Tree) -> float:
    usage: Usage = tree.sample([])
    assert usage.seconds >= 0
    return usage.cpu_seconds


def rounding(processes: int) -> float:
    """What proc(5) may round away, or add where it did so before: four times of each process."""
    return 4 * TICK * processes


def about(seconds: float, processes: int = 1) -> Any:
    """These CPU seconds, as far as they can be read for so many processes."""
    return pytest.approx(seconds, abs=rounding(processes))


def test_the_first_sample_only_begins_to_count(new_process: NewProcess) -> None:
    root = new_process()
    root.burn(0.2)
    tree = Tree(root.pid)
    before = root.cpu
    assert used(tree) == 0
    root.burn(0.2)
    middle = root.cpu
    assert middle - before >= 0.2
    assert used(tree) == about(middle - before)
    assert used(tree) == about(root.cpu - middle)


def test_cpu_is_that_of_all_processes(new_process: NewProcess) -> None:
    root = new_process()
    child = new_process(root)
    grandchild = new_process(child)
    processes = (root, child, grandchild)
    tree = Tree(root.pid)
    used(tree)
    before = sum(each.cpu for each in processes)
    for process in processes:
        process.burn(0.2)
    spent = sum(each.cpu for each in processes) - before
    assert spent >= 0.6
    assert used(tree) == about(spent, 3)


def test_cpu_of_a_new_child_counts_in_its_first_sample(new_process: NewProcess) -> None:
    root = new_process()
    tree = Tree(root.pid)
    used(tree)
    before = root.cpu
    child = new_process(root)
    child.burn(0.2)
    spent = root.cpu + child.cpu - before
    assert spent >= 0.2
    assert used(tree) == about(spent, 2)


def test_the_seconds_are_those_since_the_last_sample(new_process: NewProcess) -> None:
    tree = Tree(new_process().pid)
    began = time.monotonic()
    tree.sample([])
    middle = time.monotonic()
    time.sleep(0.2)
    usage = tree.sample([])
    assert 0.2 <= usage.seconds <= time.monotonic() - began
    assert usage.seconds <= 0.2 + (time.monotonic() - middle)


def test_cpu_of_a_child_that_burned_and_ended_between_two_samples_counts(
    new_process: NewProcess,
) -> None:
    root = new_process()
    tree = Tree(root.pid)
    used(tree)
    before = root.cpu
    child = new_process(root)
    child.burn(0.2)
    child.end(root)
    middle = root.cpu
    assert middle - before >= 0.2
    assert used(tree) == about(middle - before)
    assert used(tree) == about(root.cpu - middle)


@pytest.mark.parametrize("sample_the_zombie", [True, False])
def test_cpu_of_a_child_that_ended_is_not_counted_twice(
    new_process: NewProcess, sample_the_zombie: bool
) -> None:
    root = new_process()
    child = new_process(root)
    tree = Tree(root.pid)
    used(tree)
    before = root.cpu + child.cpu
    child.burn(0.2)
    middle = root.cpu + child.cpu
    assert used(tree) == about(middle - before, 2)
    child.burn(0.3)
    os.kill(child.pid, signal.SIGKILL)
    counted = []
    if sample_the_zombie:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        counted.append(used(tree))
    root.ask("reap", child.pid)
    counted += [used(tree), used(tree)]
    assert counted[0] >= 0.3 - rounding(2)
    assert sum(counted) == about(root.cpu - middle, 2)


def test_cpu_of_a_whole_branch_that_ended_counts(new_process: NewProcess) -> None:
    root = new_process()
    child = new_process(root)
    known = new_process(child)
    tree = Tree(root.pid)
    used(tree)
    before = root.cpu + child.cpu + known.cpu
    known.burn(0.2)
    child.burn(0.2)
    middle = root.cpu + child.cpu + known.cpu
    assert used(tree) == about(middle - before, 3)
    unknown = new_process(child)
    unknown.burn(0.3)
    unknown.end(child)
    known.burn(0.2)
    known.end(child)
    child.end(root)
    spent = root.cpu - middle
    assert spent >= 0.5
    counted = used(tree)
    assert counted == about(spent, 3)
    assert counted + used(tree) == about(root.cpu - middle, 3)


def test_a_child_that_nothing_waits_for_takes_no_time_from_the_others(
    new_process: NewProcess,
) -> None:
    """The kernel adds its time to no process of the tree."""
    root = new_process()
    parent = new_process(root)
    child = new_process(parent)
    tree = Tree(root.pid)
    used(tree)
    before = root.cpu + parent.cpu + child.cpu
    child.burn(0.5)
    assert used(tree) == about(root.cpu + parent.cpu + child.cpu - before, 3)
    os.kill(child.pid, signal.SIGKILL)
    parent.end(root)  # the kernel gives its child to another parent, outside the tree
    assert used(tree) >= 0
    before = root.cpu
    root.burn(0.3)
    assert used(tree) == about(root.cpu - before)


def orphans() -> dict[str, Any]:
    """Called in a child process: a child ends, and leaves a child that burns and holds."""
    inherit_orphans()
    tree = Tree(os.getpid())
    tree.sample([])
    theirs, ours = socket.socketpair()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            _execute_commands(theirs)
        os._exit(0)
    os.waitpid(child, 0)
    (orphan,) = (each.pid for each in psutil.Process().children())

    def ask(what: str, argument: float = 0) -> float:
        ours.send(json.dumps([what, argument]).encode())
        result: float = json.loads(ours.recv(100))
        return result

    found = tree.sample([])
    spent = [cpu_of_this_process() + ask("cpu")]
    ask("burn", 0.3)
    ask("hold", 64)
    spent.append(cpu_of_this_process() + ask("cpu"))
    burned = tree.sample([])
    ask("burn", 0.4)
    os.kill(orphan, signal.SIGKILL)
    os.waitpid(orphan, 0)
    spent.append(cpu_of_this_process())
    ended = tree.sample([])
    spent.append(cpu_of_this_process())
    after = tree.sample([])
    return {
        "processes": [found.processes, burned.processes, ended.processes],
        "counted": [usage.cpu_seconds for usage in (burned, ended, after)],
        "spent": [late - early for early, late in itertools.pairwise(spent)],
        "grown": burned.memory - found.memory,
    }


def test_orphans_stay_in_the_tree_and_their_cpu_counts() -> None:
    seen = in_a_child_process(orphans)
    assert seen["processes"] == [2, 2, 1]
    assert seen["spent"][0] >= 0.3
    assert seen["spent"][1] >= 0.4
    for counted, spent in zip(seen["counted"], seen["spent"], strict=True):
        assert counted == about(spent, 2)
    assert 60 * MB < seen["grown"] < 72 * MB
