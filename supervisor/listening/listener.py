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
_UNSEEN = (0, 0)
_BACKLOG = 65535  # the kernel takes net.core.somaxconn when that is less


class ListenError(OperatorError):
    """A socket cannot be opened; one line that names the path, says why, and what to do."""


class Listener(msgspec.Struct, eq=False, rename={"socket": "descriptor"}):
    """A bound and listening socket, and its file."""

    path: str
    socket: socket.socket  # as a descriptor in what a new master receives
    inode: tuple[int, int]  # of the file: device and number
    mode: int  # of the file
    folder: tuple[int, int]  # mode and group of the folder that it is in
    # Whether the service manager has it as well. Then it is not the daemon's to remove, to shut, or
    # to change the rights of, and clients that wait there at the end are served by the next daemon.
    lent: bool = False
    gid: int | None = None  # of the file's group, where one is set

    def is_in_place(self) -> bool:
        """Whether clients that connect to the path find this socket, as far as can be seen."""
        try:
            return self.inode == _UNSEEN or _inode(self.path) == self.inode
        except OSError:
            return False

    def bind_anew(self) -> None:
        """Bind another socket at the path, whatever socket stands there by now.

        The one before stays open: there may be clients in its queue. The caller holds the path's
        lock, and has made sure of the folder. Raises ListenError.
        """
        if self.lent:
            raise ListenError(
                f"{self.path}: is the service manager's; restart the daemon's .socket unit"
            )
        try:
            _remove_socket(self.path)
        except OSError as error:
            raise ListenError(f"{self.path}: cannot be removed: {explain(error)}") from None
        new = _bind(self.path, self.mode, self.gid)
        self.socket, self.inode = new.socket, new.inode

    def make_sure_of_folder(self) -> None:
        """If the folder is gone, make one of the same mode and group; else check it.

        Raises ListenError.
        """
        folder = os.path.dirname(self.path)
        mode, gid = self.folder
        try:
            os.mkdir(folder, 0o700)
            os.chown(folder, -1, gid)
            os.chmod(folder, mode)
        except FileExistsError:
            pass
        except OSError as error:
            raise ListenError(
                f"{folder}: is gone, and cannot be made anew: {explain(error)}"
            ) from None
        prepare_folder(self.path, create=False)

    def set_access(self, mode: int, gid: int | None) -> tuple[int, int | None]:
        """Set who may connect; returns mode and group as they were. Raises ListenError.

        Without `gid` the group stays as it is. While the socket is not in place, this is for when
        it is bound anew.
        """
        if not self.is_in_place():
            kept = self.mode, self.gid
            self.mode, self.gid = mode, gid
            return kept
        try:
            before = os.stat(self.path)
            if gid is not None and gid != before.st_gid:
                os.chown(self.path, -1, gid)
            os.chmod(self.path, mode)
        except OSError as error:
            raise ListenError(
                f"{self.path}: its mode and group cannot be set: {explain(error)}"
            ) from None
        self.mode, self.gid = mode, gid
        return stat.S_IMODE(before.st_mode), before.st_gid

    def name_this_process(self) -> None:
        """Have the kernel name this process to clients that connect from now on (SO_PEERCRED).

        It names the process that has called listen(2) last. The queue stays as it is.
        """
        self.socket.listen(_BACKLOG)

    def unlink(self) -> None:
        """Remove the file, so that no client connects any more; unless it is another's by now."""
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(self.path)
            if not self.lent and (status.st_dev, status.st_ino) == self.inode:
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
    try:
        return Listener(path, lent, _inode(path), 0, _folder_of(path), lent=True)
    except OSError:  # it stands in a folder that this process does not see
        return Listener(path, lent, _UNSEEN, 0, (0o755, -1), lent=True)


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
            f"{path}: refused, because user {owner} owns {entry} and could replace it; "
            "give it to the daemon's user (chown) or choose another folder"
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
    return _bind(path, mode, gid)


def _bind(path: str, mode: int, gid: int | None) -> Listener:
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
        return Listener(path, listening, _inode(path), mode, _folder_of(path), gid=gid)
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
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _folder_of(path: str) -> tuple[int, int]:
    """Mode and group of the folder that a socket is in. Raises OSError."""
    status = os.stat(os.path.dirname(path))
    return stat.S_IMODE(status.st_mode), status.st_gid


def _remove_stale(path: str, *, known: bool) -> None:
    """Remove a dead daemon's socket, but nothing that belongs to another program."""
    with contextlib.suppress(FileNotFoundError):
        ours = known and os.lstat(path).st_uid == os.getuid()
        if not ours and answers(path):
            raise ListenError(f"{path}: in use by another program")
    _remove_socket(path)


def _remove_socket(path: str) -> None:
    """Remove a socket's file, if there is one, but no other file. Raises ListenError, OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(
                f"{path}: exists and is not a socket; remove it or choose another path"
            )
        os.unlink(path)


def answers(path: str) -> bool:
    """Whether a socket listens at a path; of whose process is not asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # With EAGAIN a listen queue is full.
        return probe.connect_ex(path) in (0, errno.EAGAIN)
