"""What stands at a daemon's paths stays the daemon's, whoever removes or replaces it."""

import json
from pathlib import Path

import pytest
from conftest import Daemon, NewDaemon
from plain_client import connect


@pytest.fixture
def daemon_at_two_paths(new_daemon: NewDaemon) -> Daemon:
    daemon = new_daemon("workers = 2")
    both = f'["{daemon.path}", "{daemon.folder}/e.sock"]'
    daemon.replace_config(daemon.config.read_text().replace(f'["{daemon.path}"]', both))
    return daemon.run()


def test_each_path_serves_the_command(daemon_at_two_paths: Daemon) -> None:
    daemon = daemon_at_two_paths
    other = f"{daemon.folder}/e.sock"
    status = daemon.command("status", "--socket", other, "--json")
    assert json.loads(status.stdout)["pid"] == daemon.pid
    # A client that is connected already is answered after its path was given up.
    with connect(f"{daemon.path}.ctl") as early:
        daemon.replace_config(daemon.config.read_text().replace(f'"{daemon.path}", ', ""))
        done = daemon.command("reload", "--socket", other)
        assert done.returncode == 0, done
        early.sendall(b'{"command": "status"}\n')
        assert b'"pid"' in early.recv(65536)
    assert not Path(f"{daemon.path}.ctl").exists()
    stopped = daemon.command("stop", "--socket", other)
    assert stopped.returncode == 0, stopped
    assert not Path(f"{other}.ctl").exists()
