"""Folders of helper files work unchanged, and so do the clients that are deployed with them."""

import json
import shutil
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Daemon, NewDaemon
from exposing import write_modules
from plain_client import one_shot, send_one_shot
from stateful import ClientProcess

OLD_CLIENT = Path(__file__).parents[1] / "old_client.pl"

FILES = {
    "documents": """
        _open = {}
        print("documents is imported")

        def load(text):
            _open[len(_open)] = text
            print("a document is loaded")
            return {"success": True, "result": len(_open) - 1}

        def count():
            return len(_open)
    """,
    "queries": """
        import documents
        from . import documents as the_same
        from .documents import _open
        from .deeper import depth

        def read(number):
            assert the_same is documents
            return _open[number]

        def level():
            return depth()
    """,
    "deeper": """
        from .queries_base import BASE

        def depth():
            return BASE + 1
    """,
    "queries_base": """
        from . import deeper  # each imports the other

        BASE = 1
    """,
    "sheets": """
        import no_such_library_here

        def write():
            return no_such_library_here
    """,
    "reports": """
        def total():
            from sheets import write
            return write()
    """,
    "http": """
        from http import HTTPStatus  # Python's own

        def code():
            return int(HTTPStatus.OK)
    """,
}


@pytest.fixture
def daemon(new_daemon: NewDaemon) -> Daemon:
    """A daemon with a folder of helpers, whose affinity is the default."""
    daemon = new_daemon()
    files = {name: textwrap.dedent(text) for name, text in FILES.items()}
    folder = write_modules(daemon.folder / "helpers", **files)
    daemon.write_config(
        f'workers = 4\nlimits.max_requests_per_minute = 0\n[[module_dirs]]\npath = "{folder}"'
    )
    return daemon


def test_helpers_share_their_state_however_they_import_each_other(daemon: Daemon) -> None:
    daemon.run()
    with ClientProcess(daemon.path) as first, ClientProcess(daemon.path) as second:
        loaded = first.call("documents", "load", ["one"])
        assert loaded == {"success": True, "result": 0}  # the helper's own form is its own matter
        assert first.call("documents", "load", ["two"])["result"] == 1
        assert second.call("documents", "count") == 2  # all clients share a folder's state
        assert first.call("queries", "level") == 2
        assert first.call("http", "code") == 200
    assert daemon.log().count("documents is imported") == 1  # for all workers
    assert "a document is loaded" in daemon.log()


def test_a_module_reads_another_ones_state_where_both_run_in_one_worker(daemon: Daemon) -> None:
    daemon.config.write_text(daemon.config.read_text().replace("workers = 4", "workers = 1"))
    daemon.run()
    assert daemon.call("documents", "load", ["text"])["result"] == 0
    assert daemon.call("queries", "read", [0]) == "text"


def test_a_helper_that_lacks_a_library_is_left_out_and_the_others_load(daemon: Daemon) -> None:
    daemon.run()
    assert daemon.call("documents", "count") == 0
    reply = one_shot(daemon.path, "sheets", "write")
    assert reply["error_type"] == "ModuleNotAllowed"
    why = "ModuleNotFoundError: No module named 'no_such_library_here'"
    assert why in reply["error"]
    assert f"module sheets is left out: {daemon.folder}/helpers/sheets.py failed: {why}" in (
        daemon.log()
    )
    # A function that imports it when it is called fails then, as it would in any process.
    assert one_shot(daemon.path, "reports", "total")["error_type"] == "ModuleNotFoundError"


def test_check_lists_modules_functions_affinities_and_what_is_left_out(daemon: Daemon) -> None:
    done = daemon.command("check")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "module documents (affinity module): count, load" in lines
    assert "module probe (affinity none)" in done.stdout
    assert "module queries (affinity module): level, read" in lines
    (left_out,) = (line for line in lines if line.startswith("module sheets"))
    assert "left out: " in left_out
    assert "No module named 'no_such_library_here'" in left_out
    assert "sheets.py:2)" in left_out


# -- deployed clients --

TEXTS = [
    "plain",
    "Z\u00fcrich \u00e0 \u00f1",
    "\u2603 \u20ac \u4e2d\u6587",
    "\U0001f600 \U0010fffd",
    "\u0080\u00a0\u00ff\u0100",
    'quote " backslash \\ slash / \n tab \t',
]


def test_the_deployed_clients_text_comes_out_right_both_ways(daemon: Daemon) -> None:
    if shutil.which("perl") is None:
        pytest.skip("no perl")
    daemon.run()
    done = subprocess.run(
        ["perl", str(OLD_CLIENT), daemon.path, "test", "echo"],
        input=json.dumps(TEXTS),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{"text": text, "length": len(text)} for text in TEXTS]


def test_functions_receive_the_deployed_clients_characters_and_not_their_bytes(
    daemon: Daemon,
) -> None:
    daemon.run()
    for text in TEXTS:
        body = json.dumps(
            {"module": "probe", "function": "points", "params": [text], "client_version": "2.00"},
            ensure_ascii=False,
        )
        twice = body.encode().decode("latin-1").encode()
        reply = json.loads(send_one_shot(daemon.path, twice))
        assert reply["result"] == [ord(each) for each in text]
        # Escaped, or encoded once: it is not decoded a second time.
        for sent in (json.dumps(json.loads(body)).encode(), body.encode()):
            reply = json.loads(send_one_shot(daemon.path, sent))
            assert reply["result"] == [ord(each) for each in text]


def test_other_clients_text_is_never_decoded_twice(daemon: Daemon) -> None:
    daemon.run()
    text = "Z\u00fcrich".encode().decode("latin-1")  # could be text that was encoded twice
    for version in ("2.01", "0.1.0", None):
        body = {"module": "probe", "function": "points", "params": [text]}
        sent = json.dumps({**body, "client_version": version}, ensure_ascii=False).encode()
        reply = json.loads(send_one_shot(daemon.path, sent))
        assert reply["result"] == [ord(each) for each in text]


# What the first daemon's deployments set, by its documentation.
FIRST_ENVIRONMENT = {
    "CPAN_BRIDGE_DEBUG": "2",
    "CPAN_BRIDGE_MAX_CONNECTIONS": "100",
    "CPAN_BRIDGE_MAX_REQUEST_SIZE": "10485760",
    "CPAN_BRIDGE_TIMEOUT": "1800",
    "CPAN_BRIDGE_CLEANUP_INTERVAL": "300",
    "CPAN_BRIDGE_MAX_MEMORY_MB": "1024",
    "CPAN_BRIDGE_MAX_CPU_PERCENT": "200.0",
    "CPAN_BRIDGE_MAX_REQUESTS_PER_MINUTE": "2000",
    "CPAN_BRIDGE_MAX_CONCURRENT_REQUESTS": "100",
    "CPAN_BRIDGE_STALE_TIMEOUT": "300",
    "CPAN_BRIDGE_RESOURCE_CHECK_INTERVAL": "60",
    "CPAN_BRIDGE_MAX_STRING_LENGTH": "10000",
    "CPAN_BRIDGE_MAX_ARRAY_LENGTH": "1000",
    "CPAN_BRIDGE_MAX_OBJECT_DEPTH": "10",
    "CPAN_BRIDGE_MAX_PARAM_COUNT": "100",
    "CPAN_BRIDGE_STRICT_VALIDATION": "1",
}


def test_with_the_first_daemons_environment_it_says_at_start_what_is_refused_now(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2", **FIRST_ENVIRONMENT).run()
    ping = one_shot(daemon.path, "test", "ping", client_version="2.00")["result"]
    assert ping["message"] == "pong"
    assert {
        *("requests_processed", "requests_failed", "requests_rejected", "validation_failures"),
        *("security_events", "start_time", "last_cleanup", "last_resource_check"),
        *("connections_total", "connections_rejected", "peak_connections"),
    } <= set(ping["stats"])
    (line,) = (each for each in daemon.log().splitlines() if "STRING_LENGTH" in each)
    assert "[WARNING]" in line
    assert "a longer string is refused (InvalidRequest); in the first daemon it was cut" in line
    assert line.partition("environment: ")[2] in daemon.command("check").stdout
    reply = one_shot(daemon.path, "test", "echo", ["x" * 10_001])
    assert reply["error_type"] == "InvalidRequest"
    assert reply["error"].endswith(
        "params[0]: 10001 characters, at most 10000 are allowed (limits.max_string_length)"
    )


# -- the worked example --


@pytest.mark.parametrize("form", [[], ["--one-shot"]], ids=["framed", "one-shot"])
def test_the_example_runs_a_transaction_and_a_report(
    new_daemon: NewDaemon, form: list[str]
) -> None:
    if shutil.which("perl") is None:
        pytest.skip("no perl")
    root = Path(__file__).parents[2]
    daemon = new_daemon(
        "workers = 4\nlimits.max_requests_per_minute = 0\n"
        f'python_path = ["{root}/examples/modules"]\n'
        '[modules.database]\nimport = "database"\nfunctions = "*"\naffinity = "client"\n'
    ).run()

    def run(name: str) -> str:
        done = subprocess.run(
            ["perl", str(root / "examples" / "accounts.pl"), *form, str(daemon.folder / name)],
            env={**daemon.environment, "CPAN_BRIDGE_SOCKET": daemon.path},
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with ThreadPoolExecutor(6) as pool:  # many clients at once
        said = list(pool.map(run, [f"{number}.db" for number in range(6)]))
    assert said == ["refused: not enough money\nAnn      112.50\nJ\u00fcrg       7.50\n"] * 6
