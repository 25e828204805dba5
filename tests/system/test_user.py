"""`user =`: a daemon that root starts, and that is another user's from then on."""

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import COMMAND, Daemon, NewDaemon
from plain_client import until

from cpanbridge.supervisor.system import privileges

NOBODY = pwd.getpwnam("nobody")
SYSTEM_FOLDER = Path("/run/cpanbridged")
# Root with no right to look into other processes, and which keeps the right to read all files when
# it becomes another user: for a Python that stands in root's home.
KEEPING_RIGHTS = [
    "setpriv",
    "--securebits=+no_setuid_fixup",
    "--bounding-set=-all,+dac_override,+dac_read_search,+setuid,+setgid,+chown,+fowner,+kill",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]


@pytest.fixture(scope="module")
def prefix() -> list[str]:
    """How to run the command so that it can become nobody and still read Python's files."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    become = f"import os; os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid}); import wave"
    for prefix in ([], KEEPING_RIGHTS):
        with contextlib.suppress(FileNotFoundError):
            tried = [*prefix, sys.executable, "-c", become]
            if subprocess.run(tried, capture_output=True, check=False).returncode == 0:
                return prefix
    pytest.skip("another user cannot read this Python's files")


@pytest.fixture
def daemon(new_daemon: NewDaemon, prefix: list[str]) -> Daemon:
    """A daemon that is to become nobody; not started yet."""
    daemon = new_daemon('workers = 2\nuser = "nobody"\nsecurity_log = "security.log"')
    daemon.prefix = prefix
    daemon.replace_config(
        daemon.config.read_text().replace("security.log", f"{daemon.folder}/security.log")
    )
    return daemon


@pytest.fixture
def system_folder() -> Iterator[Path]:
    """The folder of root's default path, with what an earlier daemon of root's has left there."""
    if os.path.exists(f"/tmp/cpanbridged-{NOBODY.pw_uid}"):
        pytest.skip("nobody has a daemon of his own")
    try:
        SYSTEM_FOLDER.mkdir(0o755)
    except FileExistsError:
        pytest.skip(f"{SYSTEM_FOLDER} exists already")
    (SYSTEM_FOLDER / "cpanbridged.sock.lock").touch(0o600)
    (SYSTEM_FOLDER / "cpanbridged.log").touch(0o640)
    yield SYSTEM_FOLDER
    shutil.rmtree(SYSTEM_FOLDER, ignore_errors=True)


def users(daemon: Daemon) -> set[int]:
    """The users of all its processes."""
    pids = (daemon.pid, *daemon.workers(), *daemon.templates())
    return {uid for pid in pids for uid in psutil.Process(pid).uids()}


def test_started_as_root_it_becomes_the_user_that_is_set(daemon: Daemon) -> None:
    os.chown(daemon.folder, NOBODY.pw_uid, NOBODY.pw_gid)
    lock = Path(f"{daemon.path}.lock")
    lock.touch(0o600)  # of a daemon of root's
    started = daemon.command("start")
    assert started.returncode == 0, started
    assert users(daemon) == {NOBODY.pw_uid}
    assert set(psutil.Process(daemon.pid).gids()) == {NOBODY.pw_gid}
    files = daemon.path, f"{daemon.path}.ctl", f"{daemon.path}.pid", lock, daemon.log_file
    for path in (*files, daemon.folder / "security.log"):
        assert os.stat(path).st_uid == NOBODY.pw_uid, path
    assert daemon.call("test", "ping")["message"] == "pong"
    # Memory that its processes share is counted once.
    stats = until(lambda: daemon.metrics()["system_stats"]["processes"] and daemon.metrics())
    assert stats["system_stats"]["processes_measured_by_rss"] == 0
    # Root's commands trust what that user has put there, and a reload and an upgrade work.
    assert daemon.command("status").returncode == 0
    assert daemon.command("reload").returncode == 0
    upgraded = daemon.command("upgrade")
    assert upgraded.returncode == 0, upgraded
    assert users(daemon) == {NOBODY.pw_uid}
    os.rename(daemon.log_file, f"{daemon.log_file}.1")
    os.kill(daemon.pid, signal.SIGUSR1)
    until(lambda: "Logs reopened" in daemon.log())
    daemon.replace_config(daemon.config.read_text().replace('"nobody"', '"root"'))
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: "user = 'root': the running daemon has 'nobody'" in daemon.log())
    daemon.replace_config(daemon.config.read_text().replace('"root"', '"nobody"'))
    daemon.end()
    assert not any(os.path.exists(f"{daemon.path}{suffix}") for suffix in ("", ".pid", ".ctl"))


def test_what_a_daemon_of_another_user_has_stays_its_own(daemon: Daemon) -> None:
    lock = Path(f"{daemon.path}.lock")
    with lock.open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        os.chown(lock, NOBODY.pw_uid - 1, NOBODY.pw_gid)
        assert daemon.command("start").returncode == 1
        assert lock.stat().st_uid == NOBODY.pw_uid - 1


@pytest.mark.parametrize("log", ["daemon.log", "security.log"])
def test_root_opens_no_log_where_the_user_can_put_a_link(
    daemon: Daemon, tmp_path: Path, log: str
) -> None:
    roots = tmp_path / "of_root"
    roots.touch(0o600)
    path = daemon.log_file if log == "daemon.log" else daemon.folder / log
    path.unlink(missing_ok=True)
    path.symlink_to(roots)
    os.chown(daemon.folder, NOBODY.pw_uid, NOBODY.pw_gid)
    daemon.command("start")  # with the rights of KEEPING_RIGHTS the user may write to it
    assert roots.stat().st_uid == 0
    daemon.command("stop")


def test_a_log_in_a_folder_of_roots_becomes_the_users(daemon: Daemon, tmp_path: Path) -> None:
    folder = tmp_path / "roots_folder"
    folder.mkdir(0o755)
    text = daemon.config.read_text().replace(f"{daemon.folder}/security", f"{folder}/security")
    daemon.replace_config(text.replace(str(daemon.log_file), "/dev/null"))
    os.chown(daemon.folder, NOBODY.pw_uid, NOBODY.pw_gid)
    started = daemon.command("start")
    assert started.returncode == 0, started
    assert (folder / "security.log").stat().st_uid == NOBODY.pw_uid
    assert os.stat("/dev/null").st_uid == 0
    daemon.command("stop")


def test_what_root_opens_the_user_cannot_have_chosen(daemon: Daemon, tmp_path: Path) -> None:
    user = privileges.Identity("nobody", NOBODY.pw_uid, NOBODY.pw_gid, "/")
    theirs, roots = tmp_path / "theirs", tmp_path / "roots"
    for folder in (theirs, roots, tmp_path / "sticky"):
        folder.mkdir(0o755)
        (folder / "log").touch()
    os.chown(theirs, NOBODY.pw_uid, NOBODY.pw_gid)
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "sticky/folder").symlink_to(roots)
    (roots / "link").symlink_to("../theirs/log")
    (theirs / "folder").symlink_to("../roots")
    (roots / "circle").symlink_to("circle")
    reached = {
        path: privileges.reaches(user, f"{tmp_path}/{path}")
        for path in (
            *("roots/log", "roots/new", "roots/../roots//log", "sticky/folder/log"),
            *("theirs/log", "theirs/new", "roots/link", "theirs/folder/log", "sticky/log"),
            *("sticky/new", "roots/circle"),
        )
    }
    assert [path for path, is_reached in reached.items() if not is_reached] == [
        *("roots/log", "roots/new", "roots/../roots//log", "sticky/folder/log")
    ]


def test_roots_default_path_is_kept_through_reload_and_upgrade(
    daemon: Daemon, system_folder: Path
) -> None:
    lines = daemon.config.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("listen =", "log_file ="))]
    daemon.replace_config("".join(kept))
    daemon.path = str(system_folder / "cpanbridged.sock")
    daemon.log_file = system_folder / "cpanbridged.log"
    started = daemon.command("start")
    assert f"listening on {daemon.path}, log {daemon.log_file}\n" in started.stdout, started
    try:
        again = daemon.command("start")
        assert again.returncode == 1, again
        assert f"{daemon.path}: in use by a running cpanbridged" in again.stderr
        daemon.prefix = []
        for change in (None, "reload", "upgrade"):
            if change is not None:
                done = daemon.command(change)
                assert done.returncode == 0, done
            assert f"listening on {daemon.path}\n" in daemon.command("status").stdout
            assert daemon.command("call", "test", "ping").returncode == 0
            assert os.stat(daemon.path).st_uid == NOBODY.pw_uid
            # The user itself finds it too, without a configuration.
            theirs = ["setpriv", f"--reuid={NOBODY.pw_uid}", "--clear-groups"]
            rights = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
            status = subprocess.run(
                [*theirs, *rights, COMMAND, "status"],
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
                env={"PATH": os.environ["PATH"]},
            )
            assert f"listening on {daemon.path}\n" in status.stdout, status
    finally:
        stopped = daemon.command("stop")
    assert stopped.returncode == 0, stopped
    assert {path.stat().st_uid for path in system_folder.iterdir()} == {NOBODY.pw_uid}
    assert stat.S_IMODE(system_folder.stat().st_mode) == 0o755
