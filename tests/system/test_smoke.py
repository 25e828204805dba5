from conftest import Daemon
from plain_client import Framed


def test_both_forms_are_answered(daemon: Daemon) -> None:
    assert daemon.call("probe", "echo", {"a": [1, None, "\u2603"]}) == {"a": [1, None, "\u2603"]}
    with Framed(daemon.path) as client:
        reply = client.call("probe", "two", [1], request_id="r1")
        assert reply is not None
        assert reply["result"] == [1, "default"]
        assert reply["request_id"] == "r1"
    assert daemon.stop() == 0
