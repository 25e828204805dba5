"""The lock beside a socket path: filelock's users see it held for as long as there is a daemon."""

import os
import signal
import threading
import time

import filelock
import pytest
from conftest import Daemon, NewDaemon
from plain_client import until


def lock_of(daemon: Daemon) -> filelock.BaseFileLock:
    """The daemon's lock, as another program takes it."""
    return filelock.FileLock(f"{daemon.path}.lock", is_singleton=False)


def is_free(daemon: Daemon) -> bool:
    """Whether another program can take the lock now."""
    try:
        with lock_of(daemon).acquire(blocking=False):
            return True
    except filelock.Timeout:
        return False


class Watcher:
    """A thread that tries to take the lock all the time."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.attempts = 0
        self.successes = 0
        self._thread.start()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.successes += is_free(self._daemon)
            self.attempts += 1
            time.sleep(0.004)


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_nobody_else_gets_the_lock_while_the_daemon_changes(daemon: Daemon, command: str) -> None:
    pids = [daemon.pid]
    with Watcher(daemon) as watcher:
        tried = watcher.attempts
        done = daemon.command(command)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert watcher.attempts > tried + 10
        pids.append(daemon.pid)
        assert daemon.call("test", "echo", [1]) == [1]
        assert watcher.successes == 0
        # A watcher that could not succeed would prove nothing.
        daemon.end()
        until(lambda: watcher.successes)
    assert len(set(pids)) == (2 if command == "upgrade" else 1)


def test_after_a_killed_master_the_next_daemon_has_the_lock(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2").run()
    assert not is_free(daemon)
    killed = daemon.pid
    os.kill(killed, signal.SIGKILL)
    assert daemon.process is not None
    daemon.process.wait()
    assert is_free(daemon)  # though its workers may still be there
    started = daemon.command("start")
    assert (started.returncode, started.stderr) == (0, ""), started
    assert daemon.pid != killed
    assert not is_free(daemon)
    assert daemon.call("test", "echo", [1]) == [1]
    daemon.end()
    assert is_free(daemon)
