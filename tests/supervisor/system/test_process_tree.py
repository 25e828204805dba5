"""The tree's memory and CPU, measured on real processes that hold, burn, fork and end when told."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from cpanbridge.supervisor.system import process_tree as tree_module
from cpanbridge.supervisor.system.process_tree import Tree, Usage, inherit_orphans

MB = 1 << 20
TICKS = 0.05  # seconds: the kernel tells CPU time in hundredths, rounded down for each process
# What a fork of this process shares with others changes with their number.
SHARED_WITH_THE_TESTS = 40 * MB
PR_SET_DUMPABLE = 4
PR_SET_PDEATHSIG = 1


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


class Puppet:
    """A process that does what it is told: a child of the test, or of another puppet."""

    def __init__(self, parent: "Puppet | None" = None) -> None:
        self._strings, hers = socket.socketpair()
        self._strings.settimeout(60)
        if parent is None:
            self.pid = os.fork()
            if self.pid == 0:
                _perform(hers)
        else:
            self.pid = parent.ask("fork", descriptor=hers.fileno())
        hers.close()

    def ask(self, what: str, argument: float = 0, *, descriptor: int | None = None) -> int:
        """Let it do something; returns when it is done."""
        descriptors = [] if descriptor is None else [descriptor]
        socket.send_fds(self._strings, [json.dumps([what, argument]).encode()], descriptors)
        answer: int = json.loads(self._strings.recv(100))
        return answer

    def hold(self, megabytes: int) -> None:
        """Have so much memory of its own."""
        self.ask("hold", megabytes)

    def burn(self, seconds: float) -> None:
        """Use so much CPU time."""
        self.ask("burn", seconds)

    def end(self, reaper: "Puppet | None" = None) -> None:
        """End, and be waited for by its parent."""
        os.kill(self.pid, signal.SIGKILL)
        if reaper is None:
            os.waitpid(self.pid, 0)
        else:
            reaper.ask("reap", self.pid)


def _perform(strings: socket.socket) -> None:
    """The puppet's side, which never returns."""
    status = 1
    with contextlib.suppress(BaseException):
        held = []
        while True:
            message, descriptors, *_ = socket.recv_fds(strings, 100, 1)
            if not message:
                break
            what, argument = json.loads(message)
            answer = 0
            if what == "hold":
                held.append(b"x" * (argument * MB))
            elif what == "let go":
                held.clear()
            elif what == "burn":
                burn(argument)
            elif what == "fork":
                answer = os.fork()
                if answer == 0:
                    strings = socket.socket(fileno=descriptors[0])
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
            strings.send(json.dumps(answer).encode())
        status = 0
    os._exit(status)


NewPuppet = Callable[..., Puppet]


@pytest.fixture
def new_puppet() -> Iterator[NewPuppet]:
    puppets: list[Puppet] = []

    def make(parent: Puppet | None = None) -> Puppet:
        puppets.append(Puppet(parent))
        return puppets[-1]

    yield make
    for puppet in puppets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(puppet.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(puppet.pid, 0)


def in_a_process_of_its_own(work: Callable[[], object]) -> Any:
    """What `work` returns in a forked child, as JSON."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            told = [work()]
        except BaseException as error:
            told = [repr(error), "failed"]
        os.write(write_end, json.dumps(told).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = json.loads(pipe.read())
    os.waitpid(pid, 0)
    assert len(told) == 1, told
    return told[0]


# -- memory --


def test_memory_is_what_a_process_holds_of_its_own(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    child = new_puppet(root)
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


def test_a_new_process_is_measured_at_its_first_sight(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    tree = Tree(root.pid)
    tree.sample([])
    child = new_puppet(root)
    child.hold(64)
    assert tree.sample([child.pid]).by_root[child.pid] > 60 * MB


def test_memory_that_processes_share_after_a_fork_is_counted_once(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    tree = Tree(root.pid)
    before = tree.sample([])
    root.hold(64)
    assert tree.sample([]).memory - before.memory > 60 * MB
    children = [new_puppet(root) for _ in range(4)]
    together = tree.sample([child.pid for child in children])
    assert 60 * MB < together.memory - before.memory < 64 * MB + SHARED_WITH_THE_TESTS
    for child in children:
        assert psutil.Process(child.pid).memory_info().rss > 64 * MB
        assert together.by_root[child.pid] < 64 * MB // 5 + SHARED_WITH_THE_TESTS


def test_what_a_worker_has_started_counts_for_it(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    worker, other = new_puppet(root), new_puppet(root)
    grandchild = new_puppet(worker)
    great_grandchild = new_puppet(grandchild)
    tree = Tree(root.pid)
    before = tree.sample([worker.pid, other.pid])
    grandchild.hold(32)
    great_grandchild.hold(32)
    after = tree.sample([worker.pid, other.pid])
    assert after.by_root[worker.pid] - before.by_root[worker.pid] > 60 * MB
    assert after.by_root[other.pid] - before.by_root[other.pid] < 8 * MB
    assert after.processes == 5
    # Each counts for the nearest of those that are asked for.
    nearest = tree.sample([worker.pid, grandchild.pid])
    assert nearest.by_root[grandchild.pid] > 60 * MB
    assert nearest.by_root[worker.pid] < nearest.by_root[grandchild.pid]
    assert nearest.by_root[worker.pid] + nearest.by_root[grandchild.pid] < nearest.memory


def test_growth_is_seen_at_once_though_memory_is_not_read_again(
    new_puppet: NewPuppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_puppet()
    child = new_puppet(root)
    tree = Tree(root.pid)
    before = tree.sample([child.pid])
    monkeypatch.setattr(tree_module._Process, "read_pss", lambda self: None)
    child.hold(64)
    after = tree.sample([child.pid])
    assert 60 * MB < after.by_root[child.pid] - before.by_root[child.pid] < 72 * MB


def test_memory_is_read_for_a_small_share_of_the_time_and_in_turn(
    new_puppet: NewPuppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_puppet()
    root.ask("fork sleepers", 9)
    tree = Tree(root.pid)
    read: list[int] = []
    read_pss = tree_module._Process.read_pss

    def read_and_note(process: Any) -> None:
        read.append(process.handle.pid)
        read_pss(process)
        time.sleep(0.02)  # much memory

    monkeypatch.setattr(tree_module._Process, "read_pss", read_and_note)
    tree.sample([])
    everybody = set(read)
    assert len(read) == len(everybody) == 10  # all are new
    read.clear()
    command: list[int] = []
    while len(set(command)) < 10:
        tree.sample([])
        command += read
        assert len(read) < 10  # never all at once
        read.clear()
    assert len(set(command[:10])) == 10  # nobody twice before all were once


# -- the tree --


def test_200_grandchildren_are_found(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    workers = [new_puppet(root) for _ in range(4)]
    tree = Tree(root.pid)
    assert tree.sample([]).processes == 5
    for worker in workers:
        worker.ask("fork sleepers", 50)
    usage = tree.sample([worker.pid for worker in workers])
    assert usage.processes == 205
    assert all(usage.by_root[worker.pid] > 0 for worker in workers)
    assert sum(usage.by_root.values()) < usage.memory
    for worker in workers[1:]:
        worker.end(root)  # its children end with it, or become another's
    usage = tree.sample([worker.pid for worker in workers])
    assert usage.by_root[workers[0].pid] > 0
    assert [usage.by_root[worker.pid] for worker in workers[1:]] == [0, 0, 0]


def test_a_process_that_has_ended_is_there_no_more(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    child = new_puppet(root)
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


def test_the_end_of_the_root_itself_is_an_empty_tree(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    tree = Tree(root.pid)
    tree.sample([])
    root.end()
    usage = tree.sample([root.pid])
    assert (usage.processes, usage.memory, usage.by_root) == (0, 0, {root.pid: 0})


@pytest.mark.parametrize("moment", ["_measured", "_children", "read_pss"])
@pytest.mark.parametrize("first", [True, False], ids=["new", "known"])
def test_a_child_that_ends_while_it_is_looked_at_counts_as_ended(
    new_puppet: NewPuppet, monkeypatch: pytest.MonkeyPatch, moment: str, first: bool
) -> None:
    """Killed and waited for just before its numbers, its children, or its memory are read."""
    root = new_puppet()
    child, other = new_puppet(root), new_puppet(root)
    child.burn(0.5)
    tree = Tree(root.pid)
    if not first:
        tree.sample([])
    owner = tree_module._Process if moment == "read_pss" else tree_module
    look = getattr(owner, moment)
    killed: list[int] = []

    def kill_and_look(who: Any, *rest: Any) -> Any:
        pid = who if isinstance(who, int) else who.handle.pid
        if pid == child.pid and not killed:
            killed.append(pid)
            child.end(root)
        return look(who, *rest)

    monkeypatch.setattr(owner, moment, kill_and_look)
    with monkeypatch.context() as patched:
        patched.setattr(tree_module, "PSS_SHARE", 1e9)
        patched.setattr(tree_module, "PSS_SECONDS", -1.0)
        usages = [tree.sample([child.pid, other.pid])]
    assert killed
    assert usages[0].by_root[other.pid] > 0
    usages += [tree.sample([child.pid, other.pid]) for _ in range(3)]
    for usage in usages[1:]:
        assert (usage.processes, usage.by_root[child.pid]) == (2, 0)
    # What it has used was used before, and is counted at most where it was not known before.
    counted = sum(usage.cpu_seconds for usage in usages)
    assert counted < TICKS + (0.5 if first else 0)


def test_a_process_that_may_not_be_looked_at_is_not_there(
    new_puppet: NewPuppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with /proc mounted with hidepid."""
    root = new_puppet()
    hidden, seen = new_puppet(root), new_puppet(root)

    class Looked(psutil.Process):
        def __init__(self, pid: int) -> None:
            if pid == hidden.pid:
                raise psutil.AccessDenied(pid)
            super().__init__(pid)

    monkeypatch.setattr(psutil, "Process", Looked)
    usage = Tree(root.pid).sample([hidden.pid, seen.pid])
    assert usage.processes == 2
    assert usage.by_root[hidden.pid] == 0 < usage.by_root[seen.pid]


def test_a_process_that_was_given_the_pid_of_an_ended_one_is_not_ours(
    new_puppet: NewPuppet,
) -> None:
    root, stranger = new_puppet(), new_puppet()
    child = new_puppet(root)
    stranger.hold(64)
    stranger.burn(0.2)
    tree = Tree(root.pid)
    before = tree.sample([])
    child.end(root)
    tree._known[stranger.pid] = tree._known.pop(child.pid)  # as if it had got the child's pid
    after = tree.sample([stranger.pid])
    assert after.processes == 1
    assert after.by_root[stranger.pid] == 0
    assert after.memory < before.memory + 8 * MB
    assert after.cpu_seconds < TICKS


def test_a_child_of_ours_that_was_given_the_pid_of_an_ended_one_is_found(
    new_puppet: NewPuppet,
) -> None:
    root = new_puppet()
    ended, child = new_puppet(root), new_puppet(root)
    tree = Tree(root.pid)
    tree.sample([])
    ended.end(root)
    tree._known[child.pid] = tree._known.pop(ended.pid)
    tree.sample([])
    assert tree.sample([child.pid]).by_root[child.pid] > 0


def unreadable_memory() -> list[int]:
    """Called in a process of its own: another user than root looks at one that is not dumpable."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    prctl(PR_SET_DUMPABLE, 1)  # changing the user has taken it away
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
    by_rss, processes, rss, unreadable, readable = in_a_process_of_its_own(unreadable_memory)
    assert (by_rss, processes) == (1, 3)
    assert unreadable == pytest.approx(rss, abs=4 * MB)
    assert 64 * MB < readable < unreadable  # of what it shares, its share


def test_a_sample_without_descriptors_is_an_error_and_the_next_one_goes_on(
    new_puppet: NewPuppet,
) -> None:
    root = new_puppet()
    child = new_puppet(root)
    tree = Tree(root.pid)
    before = tree.sample([child.pid])
    with exhausted(), pytest.raises(OSError, match="Too many open files"):
        tree.sample([child.pid])
    after = tree.sample([child.pid])
    assert after.processes == before.processes == 2


@contextlib.contextmanager
def exhausted() -> Iterator[None]:
    """No descriptor is left."""
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


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=TICKS + 0.1 * seconds)


def test_the_first_sample_only_begins_to_count(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    root.burn(0.3)
    tree = Tree(root.pid)
    assert used(tree) == 0
    root.burn(0.3)
    assert used(tree) == about(0.3)
    assert used(tree) < TICKS


def test_cpu_is_that_of_all_processes(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    child = new_puppet(root)
    grandchild = new_puppet(child)
    tree = Tree(root.pid)
    used(tree)
    for process in (root, child, grandchild):
        process.burn(0.2)
    assert used(tree) == about(0.6)


def test_the_seconds_are_those_since_the_last_sample(new_puppet: NewPuppet) -> None:
    tree = Tree(new_puppet().pid)
    began = time.monotonic()
    tree.sample([])
    middle = time.monotonic()
    time.sleep(0.2)
    usage = tree.sample([])
    assert 0.2 <= usage.seconds <= time.monotonic() - began
    assert usage.seconds <= 0.2 + (time.monotonic() - middle)


def test_cpu_of_a_child_that_burned_and_ended_between_two_looks_counts(
    new_puppet: NewPuppet,
) -> None:
    root = new_puppet()
    tree = Tree(root.pid)
    used(tree)
    child = new_puppet(root)
    child.burn(0.4)
    child.end(root)
    assert used(tree) == about(0.4)
    assert used(tree) < TICKS


@pytest.mark.parametrize("look_at_the_zombie", [True, False])
def test_cpu_of_a_child_that_ended_is_not_counted_twice(
    new_puppet: NewPuppet, look_at_the_zombie: bool
) -> None:
    root = new_puppet()
    child = new_puppet(root)
    tree = Tree(root.pid)
    used(tree)
    child.burn(0.3)
    assert used(tree) == about(0.3)
    child.burn(0.2)
    os.kill(child.pid, signal.SIGKILL)
    looks = []
    if look_at_the_zombie:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        looks.append(used(tree))
    root.ask("reap", child.pid)
    looks += [used(tree), used(tree)]
    assert looks[0] == about(0.2)
    assert sum(looks[1:]) < TICKS


def test_cpu_of_a_whole_branch_that_ended_counts(new_puppet: NewPuppet) -> None:
    root = new_puppet()
    child = new_puppet(root)
    known, unknown = new_puppet(child), None
    tree = Tree(root.pid)
    used(tree)
    known.burn(0.2)
    child.burn(0.1)
    assert used(tree) == about(0.3)
    unknown = new_puppet(child)
    unknown.burn(0.3)
    unknown.end(child)
    known.burn(0.1)
    known.end(child)
    child.end(root)
    assert used(tree) == about(0.4)
    assert used(tree) < TICKS


def test_a_child_that_nobody_waits_for_takes_nothing_from_the_others(
    new_puppet: NewPuppet,
) -> None:
    """Its parent ignores its children's ends, and so is not told what they used."""
    root = new_puppet()
    careless = new_puppet(root)
    child = new_puppet(careless)
    tree = Tree(root.pid)
    used(tree)
    child.burn(0.3)
    assert used(tree) == about(0.3)
    os.kill(child.pid, signal.SIGKILL)
    careless.end(root)  # the kernel gives its child to another parent, outside the tree
    assert used(tree) >= 0
    root.burn(0.2)
    assert used(tree) == about(0.2)


def orphans() -> dict[str, Any]:
    """Called in a process of its own: a child ends, and leaves a child that burns and holds."""
    inherit_orphans()
    tree = Tree(os.getpid())
    tree.sample([])
    theirs, ours = socket.socketpair()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            _perform(theirs)
        os._exit(0)
    os.waitpid(child, 0)
    (grandchild,) = (each.pid for each in psutil.Process().children())

    def ask(what: str, argument: float) -> None:
        ours.send(json.dumps([what, argument]).encode())
        ours.recv(100)

    found = tree.sample([])
    ask("burn", 0.3)
    ask("hold", 64)
    burned = tree.sample([])
    ask("burn", 0.2)
    os.kill(grandchild, signal.SIGKILL)
    os.waitpid(grandchild, 0)
    ended = tree.sample([])
    after = tree.sample([])
    return {
        "processes": [found.processes, burned.processes, ended.processes],
        "cpu": [burned.cpu_seconds, ended.cpu_seconds, after.cpu_seconds],
        "grown": burned.memory - found.memory,
    }


def test_orphans_stay_in_the_tree_and_their_cpu_counts() -> None:
    seen = in_a_process_of_its_own(orphans)
    assert seen["processes"] == [2, 2, 1]
    assert seen["cpu"][0] == about(0.3)
    assert seen["cpu"][1] == about(0.2)
    assert seen["cpu"][2] < TICKS
    assert 60 * MB < seen["grown"] < 72 * MB
