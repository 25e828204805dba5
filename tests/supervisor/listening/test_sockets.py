"""A reload's changes of the socket paths: all of them, or none."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from plain_client import connect

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import InstanceError, is_locked
from cpanbridge.supervisor.listening.listener import Listener, ListenError
from cpanbridge.supervisor.listening.sockets import HeldSockets, Sockets


def paths_in(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    """Sockets that listen at `a` and `b`."""
    sockets = Sockets()
    sockets.open(Settings(listen=paths_in(tmp_path, "a", "b")))
    yield sockets
    sockets.give_back()


def state(folder: Path, sockets: Sockets) -> tuple[object, ...]:
    """What a change must leave as it was when it fails or is undone."""
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("?")}
    locked = [name for name in "abc" if is_locked(str(folder / name))]
    control = sorted(path.name for path in folder.glob("*.ctl"))
    descriptors = sorted(os.listdir("/proc/self/fd"))
    return [each.path for each in sockets.listeners], modes, locked, control, descriptors


def changed(folder: Path) -> Settings:
    """A configuration that keeps `b`, gives `a` up, and has `c` first."""
    return Settings(listen=paths_in(folder, "c", "b"), socket_mode="0660")


def test_an_undone_change_leaves_all_as_it_was(tmp_path: Path, sockets: Sockets) -> None:
    before = state(tmp_path, sockets)
    change = sockets.change(changed(tmp_path))
    assert state(tmp_path, sockets) != before
    change.undo()
    assert state(tmp_path, sockets) == before


def test_a_completed_change_gives_up_what_is_not_configured_any_more(
    tmp_path: Path, sockets: Sockets
) -> None:
    answered: list[str] = []
    sockets.answer(lambda controls: answered.extend(str(each.getsockname()) for each in controls))
    change = sockets.change(changed(tmp_path))
    connect(str(tmp_path / "a")).close()  # until it is completed
    change.complete()
    listeners, modes, locked, control, _ = state(tmp_path, sockets)
    assert sorted(listeners) == paths_in(tmp_path, "b", "c")  # type: ignore[call-overload]
    assert modes == {"b": 0o660, "c": 0o660}
    assert (locked, control) == (["b", "c"], ["b.ctl", "c.ctl"])
    # The one that is given up is answered as well, while there may be clients in its queue.
    assert answered == paths_in(tmp_path, "a.ctl", "b.ctl", "c.ctl", "b.ctl", "a.ctl")
    for _ in range(3):
        assert not sockets.close_idle()
    assert answered[5:] == paths_in(tmp_path, "c.ctl", "b.ctl")
    (former,) = sockets.former  # somebody waits at `a`
    former.accept()[0].close()
    assert [sockets.close_idle() for _ in range(3)] == [False, True, False]
    assert not sockets.former


def test_a_path_that_was_given_up_can_be_had_again_at_once(
    tmp_path: Path, sockets: Sockets
) -> None:
    sockets.change(changed(tmp_path)).complete()
    sockets.change(Settings(listen=paths_in(tmp_path, "a"))).complete()
    connect(str(tmp_path / "a")).close()


def test_a_path_that_cannot_be_opened_changes_nothing(tmp_path: Path, sockets: Sockets) -> None:
    (tmp_path / "d").write_text("no socket")
    before = state(tmp_path, sockets)
    with pytest.raises(ListenError, match="exists and is not a socket"):
        sockets.change(Settings(listen=paths_in(tmp_path, "c", "d", "b"), socket_mode="0660"))
    assert state(tmp_path, sockets) == before


def test_a_path_of_another_daemon_changes_nothing(tmp_path: Path, sockets: Sockets) -> None:
    other = Sockets()
    other.open(Settings(listen=paths_in(tmp_path, "d")))
    before = state(tmp_path, sockets)
    with pytest.raises(InstanceError, match="d: in use"):
        sockets.change(Settings(listen=paths_in(tmp_path, "c", "d")))
    assert state(tmp_path, sockets) == before
    other.give_back()


def test_without_a_descriptor_for_the_control_socket_nothing_changes(
    tmp_path: Path, sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = listener.listen

    def out_of_descriptors(path: str, *others: object) -> Listener:
        if path.endswith(listener.CONTROL):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listen(path, *others)  # type: ignore[arg-type]

    before = state(tmp_path, sockets)
    monkeypatch.setattr(listener, "listen", out_of_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        sockets.change(changed(tmp_path))
    assert state(tmp_path, sockets) == before


def test_inherited_sockets_are_left_alone_until_they_are_taken_over(
    tmp_path: Path, sockets: Sockets
) -> None:
    """Here one process is both masters; each has its own descriptors of the same sockets."""
    held = sockets.held()

    def copies(listeners: list[Listener]) -> list[Listener]:
        return [msgspec.structs.replace(each, socket=each.socket.dup()) for each in listeners]

    locks = {path: os.dup(descriptor) for path, descriptor in held.locks.items()}
    other = Sockets(HeldSockets(copies(held.listeners), copies(held.controls), [], locks))
    other.give_back()
    other._instance._close_copies()  # as the kernel does when a process ends
    for name in "ab":
        connect(str(tmp_path / name)).close()
        assert is_locked(str(tmp_path / name))
