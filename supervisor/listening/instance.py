"""One daemon for each socket path, and how to find it.

Beside each socket stand two files: `PATH.lock`, locked by the running master, and `PATH.pid` with
its process id. Only the lock tells whether a daemon runs: the kernel frees it when the master dies,
however it dies. The pid file is for people and service managers: no process is signalled because it
stands there.

The lock is filelock's: a program with `filelock.FileLock("PATH.lock")` excludes the daemon, and the
daemon excludes it. The descriptor is opened here and only locked by filelock, because in an upgrade
the new master inherits it, and a lock object of filelock cannot be inherited by another program.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Collection, Mapping

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.listening import living
from cpanbridge.supervisor.wording import explain

# `is_locked` of any process holds a shared lock for microseconds.
PASSING_HOLDER_SECONDS = 0.5
_PAUSE = 0.005


class InstanceError(OperatorError):
    """This daemon cannot have its socket paths; one line that says why."""


class Instance:
    """The paths that this process has locked. Locks do not outlive the process.

    A lock belongs to an open file description (flock(2)): it lasts until the last descriptor of
    that is closed, and unlocking any of them frees it for all. So nothing here ever unlocks. A
    forked child closes its copies at once, or it would keep a dead master's lock. A program that
    inherits the descriptors has the locks as well: in an upgrade they pass to the new master, and
    there is no instant at which they are free.
    """

    def __init__(self, inherited: Mapping[str, int] | None = None) -> None:
        self.descriptors = dict(inherited or {})  # of the locks, by path
        self.unclean: set[str] = set()
        os.register_at_fork(after_in_child=self._close_copies)

    def acquire(self, paths: Collection[str], patience: float = PASSING_HOLDER_SECONDS) -> None:
        """Lock these paths as well and write their pid files: all or none. Raises InstanceError.

        Waits up to `patience` seconds for a lock that another process holds. `unclean` has the
        paths whose last owner died and left its pid file: a socket there is stale.
        """
        with contextlib.ExitStack() as undo:
            for path in sorted(set(paths)):
                self.descriptors[path] = _lock(path, patience)
                undo.callback(self._free, path)
                if living.has_master(path):  # which makes its lock file anew in a moment
                    raise InstanceError(f"{_in_use(path)}, whose lock file was removed")
                undo.callback(_remove_pid_file, path)
                left_over = _open_trusted(f"{path}.pid")
                if left_over is not None:
                    os.close(left_over)
                    self.unclean.add(path)
                _write_pid(path)
            undo.pop_all()

    def take_over(self) -> None:
        """Become the master of all paths: check the inherited locks and write the pid files.

        Raises InstanceError for a descriptor that does not hold its path's lock.
        """
        for path, descriptor in self.descriptors.items():
            # Locking again succeeds at once where it is the description that has the lock.
            if not _try_to_lock(path, descriptor):
                raise InstanceError(f"{path}.lock: the inherited descriptor does not hold the lock")
            _write_pid(path)

    def release(self, paths: Collection[str] | None = None) -> None:
        """Remove the pid files and free the locks of these paths, or of all."""
        for path in list(self.descriptors if paths is None else paths):
            _remove_pid_file(path)
            self._free(path)

    def _free(self, path: str) -> None:
        self.unclean.discard(path)
        os.close(self.descriptors.pop(path))

    def has_lock_file(self, path: str) -> bool:
        """Whether `PATH.lock` is still the file that is locked."""
        try:
            status = os.lstat(f"{path}.lock")
        except OSError:
            return False
        return os.path.samestat(status, os.fstat(self.descriptors[path]))

    def lock_anew(self, path: str) -> None:
        """Lock what is at `PATH.lock` by now, or make it. Raises InstanceError."""
        descriptor = _lock(path, patience=0.0)
        os.close(self.descriptors[path])
        self.descriptors[path] = descriptor

    def has_pid_file(self, path: str) -> bool:
        """Whether `PATH.pid` names this process."""
        try:
            return named_pid(path) == os.getpid()
        except InstanceError:
            return False

    def write_pid_file(self, path: str) -> None:
        """Name this process in `PATH.pid`. Raises InstanceError."""
        _write_pid(path)

    def _close_copies(self) -> None:
        """Called in a forked child. The lock stays the parent's, whose descriptor is open."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def _remove_pid_file(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(f"{path}.pid")


def _lock(path: str, patience: float) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(f"{path}.lock", flags, 0o600)
    except OSError as error:
        raise InstanceError(f"{path}.lock: {_why_not_opened(path, error)}") from None
    until = time.monotonic() + patience
    try:
        while not _try_to_lock(path, descriptor):
            if time.monotonic() > until:
                raise InstanceError(_in_use(path))
            time.sleep(_PAUSE)
    except InstanceError:
        os.close(descriptor)
        raise
    return descriptor


def _why_not_opened(path: str, error: OSError) -> str:
    with contextlib.suppress(OSError):
        owner = os.lstat(f"{path}.lock").st_uid
        if owner != os.geteuid():
            return (
                f"is user {owner}'s, whose daemon runs here or did once: {explain(error)}; "
                "if none runs, remove the file"
            )
        return f"cannot be opened: {explain(error)}"
    return f"cannot be made: {explain(error)}; the socket's folder must exist and be writable"


def _try_to_lock(path: str, descriptor: int) -> bool:
    """Whether the descriptor holds the path's lock now. Raises InstanceError where none can."""
    try:
        # Not at the top: a command that only finds the daemon would start later.
        import filelock

        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        raise InstanceError(f"{path}.lock: cannot be locked: {explain(error)}") from None


def _in_use(path: str) -> str:
    pid = named_pid(path)
    return f"{path}: in use by a running cpanbridged" + (f" (pid {pid})" if pid else "")


def is_locked(socket_path: str, owner: int | None = None) -> bool:
    """Whether a master holds a path's lock.

    `owner` is the user that the daemon is to run as, where that is not this process's user. Raises
    InstanceError for a file of yet another user. Tried with a shared lock, which does not exclude
    others that try the same. That is flock(2) directly, because filelock has no shared lock; the
    two exclude each other.
    """
    descriptor = _open_trusted(f"{socket_path}.lock", owner)
    if descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def named_pid(socket_path: str, owner: int | None = None) -> int | None:
    """The process id in a path's pid file, to be shown to an operator and for nothing else.

    It may be another process's by now, or one of another PID namespace. Raises InstanceError.
    """
    descriptor = _open_trusted(f"{socket_path}.pid", owner)
    if descriptor is None:
        return None
    try:
        text = os.read(descriptor, 32).decode("ascii", "replace").strip()
    except OSError:
        return None  # it is no file
    finally:
        os.close(descriptor)
    return int(text) if text.isdecimal() and int(text) > 0 else None


def _open_trusted(path: str, trusted: int | None = None) -> int | None:
    """Open one of our files to read; None if it is not there.

    Raises InstanceError for a file of another user, who would choose what is believed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read: {explain(error)}") from None
    owner = os.fstat(descriptor).st_uid
    if owner not in (0, os.getuid(), trusted):
        os.close(descriptor)
        raise InstanceError(f"{path}: not trusted, because it is user {owner}'s")
    return descriptor


def _write_pid(socket_path: str) -> None:
    """Name this process as the master of a path. Raises InstanceError.

    The file is renamed into place, so a reader finds all of it or none. It is made with O_EXCL and
    O_NOFOLLOW, so it is not written through a link that another user has put there.
    """
    temporary = f"{socket_path}.pid.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o644), "w", encoding="ascii") as stream:
            stream.write(f"{os.getpid()}\n")
        os.rename(temporary, f"{socket_path}.pid")
    except OSError as error:
        raise InstanceError(f"{socket_path}.pid: cannot be written: {explain(error)}") from None
