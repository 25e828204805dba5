"""Calling modules through the daemon: results, errors, what is not allowed, where modules are."""

from typing import Any

import pytest
from as_json import AS_JSON, INEXACT
from conftest import Daemon, NewDaemon
from exposing import write_modules
from plain_client import Framed, one_shot, until

UNLIMITED = "workers = 2\nlimits.max_requests_per_minute = 0"


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


# -- results --


@pytest.mark.parametrize(("kind", "json_value"), AS_JSON)
def test_results_of_every_kind_reach_both_kinds_of_client(
    daemon: Daemon, kind: str, json_value: Any
) -> None:
    assert daemon.call("probe", "results", [kind]) == json_value
    with Framed(daemon.path) as client:
        reply = client.call("probe", "results", [kind])
    assert reply is not None
    assert reply["result"] == json_value


@pytest.mark.parametrize("kind", ["unprintable", "cycle", "surrogate", "exits", "doubly"])
def test_a_result_without_a_json_form_is_an_error(daemon: Daemon, kind: str) -> None:
    reply = one_shot(daemon.path, "probe", "results", [kind], request_id="r")
    assert reply["error_type"] == "UnencodableResult"
    assert reply["error"].startswith("Result of probe.results cannot be encoded as JSON: ")
    assert reply["request_id"] == "r"


def test_a_result_that_json_cannot_carry_is_refused_with_its_path_or_sent_leniently(
    new_daemon: NewDaemon,
) -> None:
    lenient = '[modules.lenient]\nimport = "probe"\nfunctions = "*"\nresults = "lenient"'
    daemon = new_daemon(f"{UNLIMITED}\n{lenient}").run()
    for kind, fault, value in INEXACT:
        reply = one_shot(daemon.path, "probe", "results", [kind])
        assert reply["error_type"] == "UnencodableResult"
        prefix = "Result of probe.results cannot be encoded as JSON: "
        assert reply["error"].startswith(prefix + fault)
        if value is not ...:
            assert daemon.call("lenient", "results", [kind]) == value
    listed = daemon.command("check").stdout.splitlines()
    assert any(
        each.startswith("module lenient (affinity none, lenient results)") for each in listed
    )


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
def test_an_exception_is_answered_with_its_type_and_message(
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


# -- where modules come from --


def test_modules_come_from_tables_libraries_and_folders(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    library = write_modules(
        daemon.folder / "library", from_library="def where(): return 'library'\n"
    )
    helpers = write_modules(
        daemon.folder / "helpers",
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
