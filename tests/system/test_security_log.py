"""Security events: always counted, logged at a limited rate, one line each whatever is sent."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, one_shot, until

UNLIMITED = "workers = 2\nlimits.max_requests_per_minute = 0"


def security_lines(file: Path) -> list[dict[str, Any]]:
    """The events that were logged so far."""
    text = file.read_bytes().decode() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def test_security_events_are_json_lines_with_the_clients_credentials(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    file = daemon.folder / "security.log"
    daemon.write_config(f'security_log = "{file}"\n{UNLIMITED}')
    daemon.run()
    for module, function in (("os", "system"), ("probe", "no"), ("probe", "two")):
        one_shot(daemon.path, module, function)
    one_shot(daemon.path, "test", "echo", bad_field=1)
    lines = until(lambda: len(found := security_lines(file)) >= 3 and found)
    events = [line["event"] for line in lines]
    assert events == ["module_not_allowed", "function_not_allowed", "invalid_request"]
    for line in lines:
        assert line["pid"] == os.getpid()
        assert (line["uid"], line["gid"]) == (os.geteuid(), os.getegid())
        assert line["worker"] in (0, 1)
        assert abs(line["timestamp"] - time.time()) < 60
    assert "'os' is not exposed" in lines[0]["message"]
    assert "security" not in daemon.log()
    assert daemon.metrics()["security_summary"]["total_security_events"] == 3


def test_security_events_are_counted_always_and_logged_at_a_limited_rate(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon()
    file = daemon.folder / "security.log"
    daemon.write_config(f'security_log = "{file}"\nworkers = 1\nlimits.max_requests_per_minute = 0')
    daemon.run()
    began = time.monotonic()
    with Framed(daemon.path) as client:
        for _ in range(300):
            reply = client.call("os", "system")
            assert reply is not None
            assert reply["error_type"] == "ModuleNotAllowed"
    seconds = time.monotonic() - began
    assert daemon.metrics()["security_summary"]["total_security_events"] == 300
    written = len(security_lines(file))
    assert 10 <= written <= 10 * (seconds + 2)

    def suppressed() -> int:
        """Cause another event: its line has the number of those that were not logged."""
        one_shot(daemon.path, "os", "system")
        return sum(line.get("suppressed_before", 0) for line in security_lines(file))

    until(lambda: suppressed() >= 300 - written)


CONTROLS = "\n\r\x00\x1b[2J\x7f\x85\x9b31m\u2028\u2029"


@pytest.mark.parametrize("where", ["own file", "log", "json log"])
def test_control_characters_from_a_client_break_no_line(new_daemon: NewDaemon, where: str) -> None:
    daemon = new_daemon()
    file = daemon.folder / "security.log" if where == "own file" else daemon.log_file
    config = f'security_log = "{file}"\n' if where == "own file" else ""
    config += 'log_format = "json"\n' if where == "json log" else ""
    daemon.write_config(config + UNLIMITED)
    daemon.run() if where != "json log" else run_with_json_log(daemon)
    before = len(file.read_text())
    # Names are checked before anything else; a field's name and a path are part of the message.
    one_shot(daemon.path, f"os{CONTROLS}", "system")
    one_shot(daemon.path, "os", f"system{CONTROLS}")
    fields: dict[str, Any] = {f"field{CONTROLS}": 1}
    one_shot(daemon.path, "probe", "echo", **fields)
    deep: Any = 1
    for _ in range(70):
        deep = {f"key{CONTROLS}": deep}
    one_shot(daemon.path, "probe", "echo", deep)
    text = until(lambda: (new := file.read_text()[before:]).count("invalid_request") >= 4 and new)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)
    assert len(text.split("\n")) == 4 + 1


def run_with_json_log(daemon: Daemon) -> None:
    """`Daemon.run` with a log whose lines are JSON."""
    done = daemon.command("start")
    assert done.returncode == 0, done.stderr
