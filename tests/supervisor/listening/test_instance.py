"""One daemon for each path; only the kernel's lock tells whether it runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
from plain_client import until

from cpanbridge.supervisor.listening.instance import Instance, InstanceError, is_locked, named_pid

HOLD = """
import os, sys, time
from cpanbridge.supervisor.listening.instance import Instance
instance = Instance()
instance.acquire(sys.argv[2:])
if sys.argv[1] == "with child" and os.fork() == 0:
    sys.stdout.write(f"{os.getpid()}\\n")
    sys.stdout.flush()
    os.close(1)
    time.sleep(60)
    os._exit(0)
sys.stdout.write("held\\n")
sys.stdout.flush()
sys.stdin.read()
instance.release()
"""


class Holder:
    """Another process that is the instance for some paths."""

    def __init__(self, *paths: str, child: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, "with child" if child else "alone", *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().strip() for _ in range(2 if child else 1)]
        assert "held" in lines
        self.child = next((int(line) for line in lines if line != "held"), None)

    def leave(self) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "d.sock")


@pytest.fixture
def holder(path: str) -> Iterator[Holder]:
    holder = Holder(path)
    yield holder
    holder.kill()


def test_it_is_locked_and_named_while_it_runs_and_not_after(path: str) -> None:
    assert not is_locked(path)
    holder = Holder(path)
    assert is_locked(path)
    assert named_pid(path) == holder.process.pid
    holder.leave()
    assert not is_locked(path)
    assert not os.path.exists(f"{path}.pid")


def test_a_second_one_is_refused_with_the_firsts_pid(path: str, holder: Holder) -> None:
    with pytest.raises(InstanceError) as caught:
        Instance().acquire([path])
    assert str(caught.value) == (
        f"{path}: in use by a running cpanbridged (pid {holder.process.pid})"
    )
    assert is_locked(path)


def test_a_killed_one_is_not_believed_to_run(path: str, holder: Holder) -> None:
    holder.kill()
    assert os.path.exists(f"{path}.pid")
    assert not is_locked(path)
    instance = Instance()
    instance.acquire([path])
    assert instance.unclean == {path}
    assert is_locked(path)
    instance.release()


def test_after_one_that_tidied_up_nothing_is_stale(path: str) -> None:
    Holder(path).leave()
    instance = Instance()
    instance.acquire([path])
    assert instance.unclean == set()
    instance.release()


def test_a_forked_child_does_not_hold_a_dead_masters_lock(path: str) -> None:
    holder = Holder(path, child=True)
    assert holder.child is not None
    try:
        holder.kill()
        os.kill(holder.child, 0)  # the child is there
        until(lambda: not is_locked(path))
        instance = Instance()
        instance.acquire([path])
        instance.release()
    finally:
        os.kill(holder.child, signal.SIGKILL)


def test_all_paths_are_locked_or_none(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.sock", "b.sock", "c.sock")]
    holder = Holder(paths[1])
    with pytest.raises(InstanceError, match=r"b\.sock: in use"):
        Instance().acquire(paths)
    assert not is_locked(paths[0])
    assert not os.path.exists(f"{paths[0]}.pid")
    holder.leave()
    instance = Instance()
    instance.acquire(paths)
    assert all(map(is_locked, paths))
    instance.release()
    assert not any(map(is_locked, paths))


def test_a_path_that_is_given_twice_is_one(path: str) -> None:
    instance = Instance()
    instance.acquire([path, path])
    assert is_locked(path)
    instance.release()


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InstanceError) as caught:
        Instance().acquire([str(tmp_path / "file" / "d.sock")])
    assert "the socket's folder must exist and be writable" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pid_file_that_cannot_be_written_is_told_and_leaves_no_lock(
    tmp_path: Path, path: str
) -> None:
    Path(f"{path}.pid.new").mkdir()
    first = str(tmp_path / "a.sock")
    with pytest.raises(InstanceError, match=r"pid: cannot be written: "):
        Instance().acquire([first, path])
    assert not is_locked(first)
    assert not is_locked(path)


def test_a_file_lock_of_another_process_is_excluded_while_the_instance_has_the_path(
    path: str, holder: Holder
) -> None:
    theirs = filelock.FileLock(f"{path}.lock", is_singleton=False)
    with pytest.raises(filelock.Timeout):
        theirs.acquire(blocking=False)
    assert is_locked(path)  # the attempt has freed nothing
    holder.leave()
    theirs.acquire(blocking=False)
    with pytest.raises(InstanceError, match="in use by a running cpanbridged"):
        Instance().acquire([path], patience=0.0)
    theirs.release()
    instance = Instance()
    instance.acquire([path])
    instance.release()


def test_a_child_that_closes_its_copy_leaves_the_lock_to_its_parent(path: str) -> None:
    holder = Holder(path, child=True)
    assert holder.child is not None
    try:
        locks = {os.readlink(each) for each in Path(f"/proc/{holder.child}/fd").iterdir()}
        assert f"{path}.lock" not in locks
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(f"{path}.lock", is_singleton=False).acquire(blocking=False)
    finally:
        os.kill(holder.child, signal.SIGKILL)
        holder.kill()


def test_only_the_user_may_lock(path: str, holder: Holder) -> None:
    assert os.stat(f"{path}.lock").st_mode & 0o077 == 0
    assert is_locked(path)


TAKE_OVER = """
import sys
from cpanbridge.supervisor.listening.instance import Instance, InstanceError
instance = Instance({sys.argv[1]: int(sys.argv[2])})
try:
    instance.take_over()
except InstanceError as error:
    sys.exit(str(error))
print("taken over", flush=True)
sys.stdin.read()
instance.release()
"""


def taking_over(path: str, descriptor: int) -> subprocess.Popen[str]:
    """Another program that inherits a descriptor and takes a path over by it."""
    return subprocess.Popen(
        [sys.executable, "-c", TAKE_OVER, path, str(descriptor)],
        pass_fds=[descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_program_that_inherits_the_locks_has_them_after_the_first_has_gone(path: str) -> None:
    first = Instance()
    first.acquire([path])
    with taking_over(path, first.descriptors[path]) as second:
        assert second.stdout is not None
        assert second.stdout.readline() == "taken over\n"
        first._close_copies()  # as the kernel does when a process ends
        assert is_locked(path)
        second.communicate()
    assert not is_locked(path)


def test_a_descriptor_that_does_not_hold_the_lock_takes_nothing_over(
    path: str, holder: Holder
) -> None:
    """It is of the same file, but of another open file description."""
    descriptor = os.open(f"{path}.lock", os.O_RDWR)
    second = taking_over(path, descriptor)
    os.close(descriptor)
    _, said = second.communicate()
    assert said == f"{path}.lock: the inherited descriptor does not hold the lock\n"
    assert is_locked(path)


def test_paths_can_be_added_and_given_up_while_others_stay(tmp_path: Path) -> None:
    first, second = (str(tmp_path / name) for name in ("a.sock", "b.sock"))
    instance = Instance()
    instance.acquire([first])
    instance.acquire([second])
    instance.release([first])
    assert not is_locked(first)
    assert is_locked(second)
    instance.release()
