"""Calling modules through the daemon: results, errors, what is not allowed, and hooks."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from as_json import AS_JSON
from conftest import Daemon, NewDaemon
from plain_client import Framed, one_shot, until

UNLIMITED = "workers = 2\nlimits.max_requests_per_minute = 0"


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


def folder_of(daemon: Daemon, name: str, **files: str) -> Path:
    """A folder of helper modules beside the daemon's configuration."""
    folder = daemon.folder / name
    folder.mkdir()
    for module, text in files.items():
        (folder / f"{module}.py").write_text(text)
    return folder


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


# -- results --


@pytest.mark.parametrize(
    ("kind", "json_value"),
    AS_JSON,
)
def test_results_of_every_kind_reach_both_kinds_of_client(
    daemon: Daemon, kind: str, json_value: Any
) -> None:
    assert daemon.call("probe", "results", [kind]) == json_value
    with Framed(daemon.path) as client:
        reply = client.call("probe", "results", [kind])
    assert reply is not None
    assert reply["result"] == json_value


@pytest.mark.parametrize("kind", ["unprintable", "cycle", "surrogate", "exits", "doubly"])
def test_a_result_without_a_json_form_is_told(daemon: Daemon, kind: str) -> None:
    reply = one_shot(daemon.path, "probe", "results", [kind], request_id="r")
    assert reply["error_type"] == "UnencodableResult"
    assert reply["error"].startswith("Result of probe.results cannot be encoded as JSON: ")
    assert reply["request_id"] == "r"


def test_a_result_of_50_mb_arrives_whole(daemon: Daemon) -> None:
    assert len(daemon.call("probe", "big", [50_000_000])) == 50_000_000


# -- errors --


@pytest.mark.parametrize(
    ("function", "params", "kind", "message"),
    [
        ("fail", ["why \u2603"], "ValueError", "Error in probe.fail: why \u2603"),
        ("fail", None, "ValueError", "Error in probe.fail: as asked"),
        ("leave", None, "SystemExit", "Error in probe.leave: 3"),
        ("type_error_inside", [1], "TypeError", "Error in probe.type_error_inside: unsupported op"),
        ("results", ["no such"], "KeyError", "Error in probe.results: 'no such'"),
        ("fail_as", ["two_lines"], "ValueError", "Error in probe.fail_as: one\ntwo"),
        ("fail_as", ["empty"], "KeyError", "Error in probe.fail_as: "),
        ("fail_as", ["surrogate"], "ValueError", "Error in probe.fail_as: a \\udc80 b"),
        ("fail_as", ["interrupt"], "KeyboardInterrupt", "Error in probe.fail_as: now"),
        ("fail_as", ["generator_exit"], "GeneratorExit", "Error in probe.fail_as: "),
        ("fail_as", ["group"], "ExceptionGroup", "Error in probe.fail_as: both (2 sub-exceptions)"),
        ("fail_as", ["unprintable"], "UnprintableError", "Error in probe.fail_as: "),
        ("fail_as", ["exiting"], "ExitingError", "Error in probe.fail_as: "),
    ],
)
def test_an_exception_is_told_with_its_type_and_message(
    daemon: Daemon, function: str, params: Any, kind: str, message: str
) -> None:
    reply = one_shot(daemon.path, "probe", function, params, request_id="r")
    assert reply["success"] is False
    assert reply["error_type"] == kind
    assert reply["error"].startswith(message)
    assert reply["request_id"] == "r"
    assert "traceback" not in reply


def test_no_exception_costs_a_worker_or_a_thread(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1\nlimits.max_requests_per_minute = 0\nthreads = 2").run()
    workers = daemon.workers()
    for _ in range(3):  # more often than there are threads
        for kind in ("interrupt", "generator_exit", "unprintable", "exiting", "group"):
            one_shot(daemon.path, "probe", "fail_as", [kind])
        for kind in ("unprintable", "cycle", "surrogate", "exits", "doubly"):
            one_shot(daemon.path, "probe", "results", [kind])
        one_shot(daemon.path, "probe", "leave")
    assert daemon.call("probe", "two", [1]) == [1, "default"]
    assert daemon.workers() == workers
    until(lambda: daemon.metrics()["gate"]["connections"] == 1)


@pytest.mark.parametrize(
    ("function", "params"),
    [
        ("two", None),
        ("two", [1, 2, 3]),
        ("two", {"third": 3}),
        ("worker_pid", [1]),
        ("worker_pid", 5),
        ("echo", [1]),
    ],
)
def test_params_that_do_not_fit_are_invalid(daemon: Daemon, function: str, params: Any) -> None:
    reply = one_shot(daemon.path, "probe", function, params)
    assert reply["error_type"] == "InvalidParams"
    assert reply["error"].startswith(f"Invalid params for probe.{function}: ")


@pytest.mark.parametrize(
    ("module", "function", "kind", "words"),
    [
        ("os", "system", "ModuleNotAllowed", "'os' is not exposed; allowed: probe, system, test"),
        ("Probe", "echo", "ModuleNotAllowed", "'Probe' is not exposed"),
        ("probe", "Opaque", "FunctionNotAllowed", "'Opaque' of module 'probe' is not exposed"),
        ("probe", "os", "FunctionNotAllowed", "allowed: "),
        ("test", "no", "FunctionNotAllowed", "allowed: echo, health, ping, stats"),
        ("probe", "__import__", "InvalidRequest", "`$.function`"),
        ("os.path", "join", "InvalidRequest", "`$.module`"),
    ],
)
def test_what_is_not_exposed_is_not_allowed(
    daemon: Daemon, module: str, function: str, kind: str, words: str
) -> None:
    reply = one_shot(daemon.path, module, function, request_id="r")
    assert reply["error_type"] == kind
    assert words in reply["error"]
    assert reply["request_id"] == "r"


# -- security events --


def security_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().decode().splitlines()]


def test_security_events_are_json_lines_that_say_who_it_was(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    file = daemon.folder / "security.log"
    daemon.write_config(f'security_log = "{file}"\n{UNLIMITED}')
    daemon.run()
    for module, function in (("os", "system"), ("probe", "no"), ("probe", "two")):
        one_shot(daemon.path, module, function)
    one_shot(daemon.path, "test", "echo", bad_field=1)
    lines = until(lambda: len(lines_of(file)) >= 3 and security_lines(file))
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

    def told() -> int:
        """A later event tells how many were left out."""
        one_shot(daemon.path, "os", "system")
        return sum(line.get("suppressed_before", 0) for line in security_lines(file))

    until(lambda: told() >= 300 - written)


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
    # Names are checked before anything else; another field's name is told, and so is a path.
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


# -- printing --


def test_what_a_function_prints_is_in_the_log_and_never_in_a_reply(daemon: Daemon) -> None:
    reply = one_shot(daemon.path, "probe", "say", ['{"success": true}\nprinted here'])
    assert (reply["success"], reply["result"]) == (True, None)
    with Framed(daemon.path) as client:
        framed = client.call("probe", "say", ["printed there"])
    assert framed is not None
    assert framed["result"] is None
    until(lambda: "printed here\n" in daemon.log() and "printed there\n" in daemon.log())


def test_what_a_function_prints_is_utf_8_in_any_locale(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1", PYTHONIOENCODING="ascii").run()
    assert one_shot(daemon.path, "probe", "say", ["\u2603 printed"])["success"]
    until(lambda: "\u2603 printed\n" in daemon.log())


# -- hooks --

HOOKS = """
import os
def mark(what):
    with open({marks!r}, "a") as stream:
        stream.write(f"{{what}} {{os.getpid()}}\\n")
def cleanup_stale_resources(): mark("cleanup")
def shutdown(): mark("shutdown")
"""
BROKEN_HOOKS = """
def cleanup_stale_resources(): raise SystemExit("cleanup cannot")
def shutdown(): raise ValueError("shutdown cannot")
"""


def with_hooks(daemon: Daemon, more: str = "", **files: str) -> Path:
    marks = daemon.folder / "marks"
    files = {"hooked": HOOKS.format(marks=str(marks)), **files}
    folder = folder_of(daemon, "hooks", **files)
    daemon.write_config(f'{UNLIMITED}\n{more}\n[[module_dirs]]\npath = "{folder}"')
    return marks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_worker_runs_the_shutdown_hooks_when_it_leaves(
    new_daemon: NewDaemon, number: signal.Signals
) -> None:
    daemon = new_daemon()
    marks = with_hooks(daemon)
    daemon.run()
    workers = daemon.workers()
    assert daemon.stop(number) == 0
    assert sorted(lines_of(marks)) == sorted(f"shutdown {pid}" for pid in workers)


def test_each_worker_runs_the_cleanup_hooks_again_and_again(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    marks = with_hooks(daemon, "limits.cleanup_interval = 0.2")
    daemon.run()
    for pid in daemon.workers():
        until(lambda pid=pid: lines_of(marks).count(f"cleanup {pid}") >= 2)


def test_a_hook_that_fails_keeps_no_other_from_running(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    marks = with_hooks(daemon, "limits.cleanup_interval = 0.2", a_broken=BROKEN_HOOKS)
    daemon.run()
    workers = daemon.workers()
    for pid in workers:
        until(lambda pid=pid: lines_of(marks).count(f"cleanup {pid}") >= 2)
    assert daemon.stop() == 0
    for pid in workers:
        assert f"shutdown {pid}" in lines_of(marks)
    assert "a_broken.cleanup_stale_resources() failed" in daemon.log()
    assert "a_broken.shutdown() failed" in daemon.log()


def test_a_cleanup_hook_that_hangs_keeps_nobody_from_being_served_or_stopping(
    new_daemon: NewDaemon,
) -> None:
    hanging = "import time\ndef cleanup_stale_resources():\n    print('hangs', flush=True)\n"
    daemon = new_daemon()
    with_hooks(daemon, "limits.cleanup_interval = 0.1", a_hanging=hanging + "    time.sleep(600)\n")
    daemon.run()
    until(lambda: daemon.log().count("hangs") == 2)
    assert daemon.call("probe", "two", [1]) == [1, "default"]
    assert daemon.stop() == 0
    assert daemon.log().count("hangs") == 2


def test_hooks_cannot_be_called_by_clients(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with_hooks(daemon)
    daemon.run()
    for hook in ("shutdown", "cleanup_stale_resources"):
        assert one_shot(daemon.path, "hooked", hook)["error_type"] == "FunctionNotAllowed"


# -- where modules come from --


def test_modules_from_everywhere(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    library = folder_of(daemon, "library", from_library="def where(): return 'library'\n")
    helpers = folder_of(
        daemon,
        "helpers",
        stats="def mean(data): return 'the file'\n",
        http="import http.client\ndef status(): return int(http.client.OK)\n",
        email="def send(): return 'own email'\n",
        uses="import from_library, http\ndef where(): return from_library.where()\n"
        "def phrase(): return http.HTTPStatus(404).phrase\n",
    )
    daemon.write_config(
        f'{UNLIMITED}\npython_path = ["{library}"]\n'
        '[modules.stats]\nimport = "statistics"\nfunctions = ["mean"]\n'
        '[modules.lib]\nimport = "from_library"\nfunctions = "*"\n'
        '[modules.math]\nimport = "math"\nfunctions = ["sqrt", "hypot"]\n'
        f'[[module_dirs]]\npath = "{helpers}"'
    )
    daemon.run()
    assert daemon.call("stats", "mean", [[1, 2, 3]]) == 2
    assert daemon.call("lib", "where") == "library"
    assert daemon.call("uses", "where") == "library"
    assert daemon.call("uses", "phrase") == "Not Found"
    assert daemon.call("http", "status") == 200
    assert daemon.call("email", "send") == "own email"
    assert daemon.call("math", "sqrt", 16) == 4
    assert one_shot(daemon.path, "math", "sqrt")["error_type"] == "InvalidParams"
    assert one_shot(daemon.path, "math", "sqrt", "x")["error_type"] == "TypeError"
    assert one_shot(daemon.path, "math", "cos", 1)["error_type"] == "FunctionNotAllowed"
    assert one_shot(daemon.path, "from_library", "where")["error_type"] == "ModuleNotAllowed"


@pytest.mark.parametrize("command", ["start", "run", "check"])
def test_a_broken_module_stops_the_start_with_one_line(new_daemon: NewDaemon, command: str) -> None:
    daemon = new_daemon()
    folder = folder_of(daemon, "helpers", broken="x = 1\nraise ValueError('not today')\n")
    daemon.write_config(f'{UNLIMITED}\n[[module_dirs]]\npath = "{folder}"')
    done = daemon.command(command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{folder}/broken.py failed: ValueError: not today" in line
    assert f"({folder}/broken.py:2)" in line
