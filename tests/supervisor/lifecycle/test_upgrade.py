"""What a new master makes of the old one's first message."""

import json
import socket

import pytest

from cpanbridge.supervisor.lifecycle.upgrade import UpgradeError, inherit


@pytest.mark.parametrize("message", ['{"estate": {"pool": 7}}', "{}", '{"ready": true}', "no JSON"])
def test_a_message_of_another_version_is_refused_in_one_line(message: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(message.encode() + b"\n")
        with pytest.raises(UpgradeError) as caught:
            inherit(theirs.detach())
        reason = str(caught.value)
        assert reason.startswith("this version cannot read what the running one hands over (")
        assert reason.endswith("); stop it and start it")
        assert "\n" not in reason
        assert json.loads(ours.recv(4096)) == {"error": reason}


def test_an_old_master_that_is_gone_is_told() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(UpgradeError, match="the old master is gone"):
        inherit(theirs.detach())
