"""The listening sockets: in which folders they may be, binding them, and removing them.

A user who may open a socket may call what is exposed, so the file's permissions are the access
control: they are set before the socket listens, and a folder in which another user could replace
the socket is refused. Called in the master, and in the `cpanbridged` command before it forks.
"""

import contextlib
import errno
import grp
import os
import socket
import stat
from collections.abc import Collection

import msgspec

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.wording import explain

CONTROL = ".ctl"  # the control socket beside a path is that path with this suffix
# Bytes: sun_path holds 108 with the final zero (unix(7)), and the control socket needs the suffix.
_MAX_PATH = 107 - len(CONTROL)
_SO_PASSRIGHTS = 83  # asm-generic/socket.h; the socket module does not have it yet
_FIRST_LENT = 3  # sd_listen_fds(3)
_BACKLOG = 65535  # the kernel takes net.core.somaxconn when that is less


class ListenError(OperatorError):
    """A socket cannot be opened; one line that names the path, says why, and what to do."""


class Listener(msgspec.Struct, frozen=True, rename={"socket": "descriptor"}):
    """A bound and listening socket, and its file."""

    path: str
    socket: socket.socket  # as a descriptor in what a new master receives
    inode: tuple[int, int]  # of the file: device and number
    # Whether the service manager has it as well. Then it is not the daemon's to remove, to shut, or
    # to change the rights of, and clients that wait there at the end are served by the next daemon.
    lent: bool = False

    def set_access(self, mode: int, gid: int | None) -> tuple[int, int]:
        """Set who may connect; returns mode and group as they were. Raises ListenError.

        Without `gid` the group stays as it is.
        """
        try:
            before = os.stat(self.path)
            if gid is not None and gid != before.st_gid:
                os.chown(self.path, -1, gid)
            os.chmod(self.path, mode)
        except OSError as error:
            raise ListenError(
                f"{self.path}: its mode and group cannot be set: {explain(error)}"
            ) from None
        return stat.S_IMODE(before.st_mode), before.st_gid

    def name_this_process(self) -> None:
        """Have the kernel name this process to clients that connect from now on (SO_PEERCRED).

        It names the process that has called listen(2) last. The queue stays as it is.
        """
        self.socket.listen(_BACKLOG)

    def unlink(self) -> None:
        """Remove the file, so that no client connects any more; unless it is another's by now."""
        with contextlib.suppress(FileNotFoundError):
            if not self.lent and _inode(self.path) == self.inode:
                os.unlink(self.path)


def from_service_manager() -> list[Listener]:
    """The listening sockets that this process was started with: systemd's LISTEN_FDS.

    Raises ListenError for one that is of no use.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    return [_lent(descriptor) for descriptor in range(_FIRST_LENT, _FIRST_LENT + int(count))]


def _lent(descriptor: int) -> Listener:
    os.set_inheritable(descriptor, False)
    try:
        lent = socket.socket(fileno=descriptor)
        path = lent.getsockname()
        listening = lent.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(f"LISTEN_FDS: descriptor {descriptor}: {explain(error)}") from None
    if (lent.family, lent.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listening:
        raise ListenError(
            f"LISTEN_FDS: descriptor {descriptor} is not a listening stream socket with a path: "
            "ListenStream= must be one"
        )
    if not isinstance(path, str) or not path.startswith("/"):
        raise ListenError(f"LISTEN_FDS: descriptor {descriptor} has no path")
    lent.setblocking(False)
    _take_no_descriptors(lent)
    return Listener(path, lent, (0, 0), lent=True)


def prepare_folder(path: str, *, create: bool, owner: int | None = None) -> None:
    """Check that no other user can replace the socket. Raises ListenError.

    `owner` is the user that the daemon is to run as, where that is not this process's user. With
    `create`, for default paths, make the folder if it is missing.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if create:
        mode = 0o755 if os.getuid() == 0 else 0o700
        try:
            os.makedirs(folder, mode, exist_ok=True)
        except OSError as error:
            raise ListenError(f"{folder}: cannot be made: {explain(error)}") from None
    length = len(os.fsencode(path))
    if length > _MAX_PATH:
        raise ListenError(f"{path}: too long for a socket: {length} bytes, at most {_MAX_PATH}")
    try:
        os.stat(f"{folder}/")  # it is a folder, and its links do not lead in a circle
        _check_folder(path, folder, {0, os.getuid(), os.getuid() if owner is None else owner})
    except OSError as error:
        raise ListenError(f"{folder}: {explain(error)}; the socket's folder must exist") from None


def _check_folder(path: str, folder: str, trusted: Collection[int]) -> str:
    """Check a folder and all that contain a part of the path to it; its path without links.

    Links are followed one by one: a user who may replace a link decides where the path leads.
    Raises OSError, and ListenError for what another user could replace.
    """
    real = "/"
    if folder.strip("/"):
        parent, name = os.path.split(folder.rstrip("/"))
        above = _check_folder(path, parent, trusted)
        if name in (".", ".."):
            return above if name == "." else os.path.dirname(above)
        real = os.path.join(above, name)
        status = os.lstat(real)
        if stat.S_ISLNK(status.st_mode):
            _check_owner(path, real, status.st_uid, trusted)
            return _check_folder(path, os.path.join(above, os.readlink(real)), trusted)
    status = os.stat(real)
    _check_owner(path, real, status.st_uid, trusted)
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_write and not status.st_mode & stat.S_ISVTX:
        raise ListenError(
            f"{path}: refused, because others may write in {real} and could replace it; "
            f"take that right away (chmod go-w {real}) or choose another folder"
        )
    return real


def _check_owner(path: str, entry: str, owner: int, trusted: Collection[int]) -> None:
    if owner not in trusted:
        raise ListenError(
            f"{path}: refused, because user {owner} owns {entry} and could replace it"
        )


def _take_no_descriptors(listening: socket.socket) -> None:
    """Refuse descriptors that clients pass by SCM_RIGHTS, where the kernel can.

    They are of no use, and a passed socket with SO_LINGER, closed by its sender, would hold up the
    thread that receives the message.
    """
    with contextlib.suppress(OSError):  # ENOPROTOOPT before Linux 6.16
        listening.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def listen(path: str, mode: int, group: str | None, stale: Collection[str]) -> Listener:
    """Bind and listen. A socket at a path in `stale` is known to be a dead daemon's.

    The caller holds the path's lock. Raises ListenError.
    """
    gid = group_id(group)
    _remove_stale(path, known=path in stale)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        umask = os.umask(0o177)  # for this user only, until mode and group are set
        try:
            listening.bind(path)
        finally:
            os.umask(umask)
        if gid is not None:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
        _take_no_descriptors(listening)
        return Listener(path, listening, _inode(path))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenError(f"{path}: another program has just bound it") from None
        raise ListenError(f"{path}: cannot listen there: {explain(error)}") from None


def group_id(group: str | None) -> int | None:
    """The number of the group that `socket_group` names. Raises ListenError if there is none."""
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(f"socket_group = {group!r}: there is no such group") from None


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _remove_stale(path: str, *, known: bool) -> None:
    """Remove a dead daemon's socket, but nothing that belongs to another program."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ListenError(f"{path}: exists and is not a socket; remove it or choose another path")
    if not (known and status.st_uid == os.getuid()) and _answers(path):
        raise ListenError(f"{path}: in use by another program")
    os.unlink(path)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # With EAGAIN a listen queue is full.
        return probe.connect_ex(path) in (0, errno.EAGAIN)
