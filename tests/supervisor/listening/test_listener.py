"""Who could swap the socket, whose socket file may be removed, and with which rights it stands."""

import os
import socket
import stat
from pathlib import Path

import pytest
from plain_client import connect

from cpanbridge.supervisor.listening.listener import ListenError, listen, prepare_folder

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
STRANGER = 54321


def refused(path: Path | str, *, create: bool = False) -> str:
    with pytest.raises(ListenError) as caught:
        prepare_folder(str(path), create=create)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- folders --


def test_a_folder_of_ones_own_is_trusted(tmp_path: Path) -> None:
    prepare_folder(str(tmp_path / "d.sock"), create=False)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_in_which_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    message = refused(folder / "d.sock")
    assert f"others may write in {folder}" in message
    assert f"chmod go-w {folder}" in message
    folder.chmod(mode | stat.S_ISVTX)  # as /tmp: others cannot remove what is not theirs
    prepare_folder(str(folder / "d.sock"), create=False)


def test_a_folder_above_in_which_others_may_write_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "open" / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    assert f"others may write in {tmp_path}/open " in refused(inner / "d.sock")


@as_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "theirs" / "inner"
    inner.mkdir(parents=True)
    os.chown(tmp_path / "theirs", STRANGER, -1)
    assert f"user {STRANGER} owns {tmp_path}/theirs and" in refused(inner / "d.sock")
    assert f"user {STRANGER} owns" in refused(tmp_path / "theirs" / "d.sock")


def test_a_symbolic_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert "others may write" in refused(tmp_path / "link" / "d.sock")


def test_a_symbolic_link_that_others_could_replace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link").symlink_to(tmp_path / "own")
    (tmp_path / "open").chmod(0o777)
    assert "could replace it" in refused(tmp_path / "open" / "link" / "d.sock")


@as_root
def test_a_symbolic_link_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    link = tmp_path / "shared" / "link"
    link.symlink_to(tmp_path / "own")
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    assert "could replace it" in refused(link / "d.sock")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    assert "the socket's folder must exist" in refused(tmp_path / "none" / "d.sock")


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(tmp_path / "file" / "d.sock") or "not a folder" in refused(
        tmp_path / "file" / "d.sock"
    )


@pytest.mark.parametrize("letter", ["x", "\u00e4"])
def test_a_path_that_does_not_fit_a_socket_is_told(tmp_path: Path, letter: str) -> None:
    room = 103 - len(os.fsencode(tmp_path)) - 1
    prepare_folder(str(tmp_path / ("x" * room)), create=False)
    fits_not = letter * (room // len(letter.encode()) + 1)
    assert "at most 103" in refused(tmp_path / fits_not)


def test_the_daemons_own_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    prepare_folder(str(tmp_path / "new" / "d.sock"), create=True)
    mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert mode == (0o755 if os.getuid() == 0 else 0o700)
    prepare_folder(str(tmp_path / "new" / "d.sock"), create=True)


@as_root
def test_the_daemons_own_folder_is_refused_when_another_user_made_it_first(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    os.chown(tmp_path / "taken", STRANGER, -1)
    assert f"user {STRANGER} owns" in refused(tmp_path / "taken" / "d.sock", create=True)


# -- binding --


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_has_the_mode_that_was_asked_for(tmp_path: Path, mode: int) -> None:
    umask = os.umask(0o077)
    try:
        listener = listen(str(tmp_path / "d.sock"), mode, None, ())
        assert os.umask(0o077) == 0o077  # left as it was
    finally:
        os.umask(umask)
    with listener.socket:
        assert stat.S_IMODE((tmp_path / "d.sock").stat().st_mode) == mode
        connect(listener.path).close()


@as_root
def test_the_socket_has_the_group_that_was_asked_for(tmp_path: Path) -> None:
    import grp

    group = grp.getgrall()[-1]
    with listen(str(tmp_path / "d.sock"), 0o660, group.gr_name, ()).socket:
        assert (tmp_path / "d.sock").stat().st_gid == group.gr_gid


def test_a_group_that_does_not_exist_is_told_before_anything_is_bound(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="socket_group = 'no-such': there is no such group"):
        listen(str(tmp_path / "d.sock"), 0o660, "no-such", ())
    assert not (tmp_path / "d.sock").exists()


def test_a_socket_that_nobody_serves_makes_room(tmp_path: Path) -> None:
    path = str(tmp_path / "d.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with listen(path, 0o600, None, ()).socket:
        connect(path).close()


def test_a_socket_that_another_program_serves_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "d.sock")
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen(1)
        with pytest.raises(ListenError, match="in use by another program"):
            listen(path, 0o600, None, ())
        connect(path).close()


def test_a_socket_whose_queue_is_full_is_still_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "d.sock")
    with socket.socket(socket.AF_UNIX) as theirs, connect_filling(theirs, path):
        with pytest.raises(ListenError, match="in use by another program"):
            listen(path, 0o600, None, ())
        assert os.path.exists(path)


def connect_filling(listening: socket.socket, path: str) -> socket.socket:
    """Bind, listen with the shortest queue, and fill it with the socket that is returned."""
    listening.bind(path)
    listening.listen(0)
    filler = connect(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        with pytest.raises(BlockingIOError):
            probe.connect(path)
    return filler


def test_a_dead_daemons_socket_is_removed_though_its_orphans_still_hold_it(tmp_path: Path) -> None:
    path = str(tmp_path / "d.sock")
    with socket.socket(socket.AF_UNIX) as orphaned:
        orphaned.bind(path)
        orphaned.listen(1)
        with listen(path, 0o600, None, {path}).socket as ours:
            connect(path).close()
            client, _ = ours.accept()
            client.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_a_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.sock"
    if kind == "file":
        path.write_text("data")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        listen(str(path), 0o600, None, {str(path)})
    assert os.path.lexists(path)


def test_only_ones_own_socket_file_is_taken_away(tmp_path: Path) -> None:
    path = str(tmp_path / "d.sock")
    first = listen(path, 0o600, None, ())
    second = listen(path, 0o600, None, {path})
    first.unlink()
    assert os.path.exists(path)
    second.unlink()
    assert not os.path.exists(path)
    second.unlink()  # nothing there is fine
    first.socket.close()
    second.socket.close()
