"""One daemon for each socket path, and how to find it.

Beside each socket stand two files: `PATH.lock`, locked by the running master, and `PATH.pid` with
its process id. Only the lock tells whether a daemon runs: the kernel frees it when the master dies,
however it dies. The pid file is believed only while the lock is held.
"""

import contextlib
import os
import time
from collections.abc import Sequence

import filelock

# Somebody who merely looks whether a daemon runs holds the lock for microseconds.
_PASSING_HOLDER_SECONDS = 0.5


class InstanceError(Exception):
    """This daemon cannot have its socket paths; one line that says why."""


class Instance:
    """The paths that this process has locked. Locks do not outlive the process; `release` tidies.

    filelock closes the descriptors in forked children, so workers never hold a dead master's lock.
    """

    def __init__(self, sockets: Sequence[str]) -> None:
        self._sockets = list(sockets)
        self._locks: list[filelock.BaseFileLock] = []
        self.unclean: set[str] = set()

    def acquire(self) -> None:
        """Lock every path and write the pid files. Raises InstanceError.

        `unclean` has the paths whose last owner died without tidying up: a socket there is stale.
        """
        for path in sorted(set(self._sockets)):
            lock = _lock(path)
            try:
                lock.acquire(timeout=_PASSING_HOLDER_SECONDS)
            except filelock.Timeout:
                pid = _read_pid(path)
                self.release()
                raise InstanceError(
                    f"{path}: in use by a running cpanbridged" + (f" (pid {pid})" if pid else "")
                ) from None
            except OSError as error:
                self.release()
                raise InstanceError(
                    f"{path}.lock: cannot be made: {error.strerror}; "
                    "the socket's folder must exist and be writable"
                ) from None
            self._locks.append(lock)
            if os.path.exists(f"{path}.pid"):
                self.unclean.add(path)
            _write_pid(path)

    def release(self) -> None:
        """Remove the pid files and free the locks. Called in the master only."""
        for lock in self._locks:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file.removesuffix(".lock") + ".pid")
            lock.release()
        self._locks.clear()


def running_pid(socket_path: str) -> int | None:
    """The master that serves a socket path, or None.

    Raises InstanceError when it cannot be told.
    """
    if not os.path.exists(f"{socket_path}.lock"):
        return None
    until = time.monotonic() + _PASSING_HOLDER_SECONDS
    while True:
        try:
            with _lock(socket_path).acquire(blocking=False):
                return None
        except filelock.Timeout:
            pid = _read_pid(socket_path)
        except OSError as error:
            raise InstanceError(f"{socket_path}.lock: {error.strerror}") from None
        if pid is not None:
            return pid
        if time.monotonic() > until:
            raise InstanceError(f"{socket_path}.lock is held, but {socket_path}.pid tells no pid")
        time.sleep(0.01)  # it has only just got the lock


def _lock(socket_path: str) -> filelock.BaseFileLock:
    return filelock.FileLock(
        f"{socket_path}.lock", mode=0o600, thread_local=False, poll_interval=0.02
    )


def _read_pid(socket_path: str) -> int | None:
    try:
        with open(f"{socket_path}.pid", encoding="ascii") as stream:
            return int(stream.read())
    except (OSError, ValueError):
        return None


def _write_pid(socket_path: str) -> None:
    temporary = f"{socket_path}.pid.new"
    try:
        with open(temporary, "w", encoding="ascii") as stream:
            stream.write(f"{os.getpid()}\n")
        os.rename(temporary, f"{socket_path}.pid")  # whole or not at all
    except OSError as error:
        raise InstanceError(f"{socket_path}.pid: cannot be written: {error.strerror}") from None
