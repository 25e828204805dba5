"""Whether a master lives whose files are gone."""

import os
import socket
import time
from pathlib import Path

import pytest
from plain_client import until

from cpanbridge.supervisor.listening.living import has_master


@pytest.mark.parametrize("user", [os.getuid(), 65534])
def test_only_a_process_of_this_user_or_root_counts(tmp_path: Path, user: int) -> None:
    if user != os.getuid() and os.getuid() != 0:
        pytest.skip("only root can start another user's process")
    path = str(tmp_path / "a")
    control = socket.socket(socket.AF_UNIX)
    control.bind(f"{path}.ctl")
    control.listen()
    os.unlink(f"{path}.ctl")
    become, is_it = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresuid(user, user, user)
        os.write(is_it, b"y")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(become, 1)
        control.close()
        assert has_master(path) == (user == os.getuid())
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    until(lambda: not has_master(path))
    os.close(become)
    os.close(is_it)
