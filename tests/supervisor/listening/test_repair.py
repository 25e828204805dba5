"""Which files at a daemon's paths are made anew, and which are left to others."""

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from plain_client import connect

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening.repair import Repair
from cpanbridge.supervisor.listening.sockets import Sockets


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    sockets = Sockets()
    sockets.open(Settings(listen=[str(tmp_path / "a")], socket_mode="0660"))
    yield sockets
    sockets.give_back()


def test_without_the_lock_nothing_is_made_anew(
    tmp_path: Path, sockets: Sockets, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has the lock has the path, until it is free again."""
    repair = Repair(sockets)
    for name in ("a", "a.lock"):
        (tmp_path / name).unlink()
    with (tmp_path / "a.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        for _ in range(3):
            assert not repair.check()
        assert repair.unreachable() == [str(tmp_path / "a")]
        (loss,) = repair.losses.values()
        assert loss.found == "replaced"
        assert "in use" in (loss.problem or "")
        assert len(caplog.records) == 1
    assert repair.check()
    connect(str(tmp_path / "a")).close()
    assert repair.unreachable() == []
    assert {each.problem for each in repair.losses.values()} == {None}


def test_a_folder_in_place_of_a_file_is_left_and_costs_no_descriptor(
    tmp_path: Path, sockets: Sockets
) -> None:
    repair = Repair(sockets)
    for name in ("a", "a.pid", "a.ctl"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    repair.check()
    before = os.listdir("/proc/self/fd")
    repair.check()
    assert os.listdir("/proc/self/fd") == before
    assert [each.path for each in repair.losses.values() if each.problem] == [
        str(tmp_path / name) for name in ("a.pid", "a", "a.ctl")
    ]
    for name in ("a", "a.pid", "a.ctl"):
        (tmp_path / name).rmdir()
    assert repair.check()
    # What is not served any more is not told of.
    sockets.change(Settings(listen=[str(tmp_path / "b")])).complete()
    repair.check()
    assert not repair.losses


def test_what_leads_to_the_socket_is_left_and_what_does_not_gets_the_same_rights(
    tmp_path: Path, sockets: Sockets
) -> None:
    repair = Repair(sockets)
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "a").symlink_to("elsewhere")
    assert not repair.check()
    assert not repair.losses
    (tmp_path / "a").unlink()
    assert repair.check()
    status = os.lstat(tmp_path / "a")
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o660


def test_nothing_is_made_in_a_folder_where_others_could_replace_it(
    tmp_path: Path, sockets: Sockets
) -> None:
    repair = Repair(sockets)
    for each in tmp_path.iterdir():
        each.unlink()
    tmp_path.chmod(0o777)
    assert not repair.check()
    assert not any(tmp_path.iterdir())
    (loss,) = repair.losses.values()
    assert "others may write" in (loss.problem or "")
    tmp_path.chmod(0o755)
    assert repair.check()
    assert {each.problem for each in repair.losses.values()} == {None}
