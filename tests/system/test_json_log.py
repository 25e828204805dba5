"""With `log_format = "json"` each line of the log is an object, whatever writes it."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from exposing import write_modules
from plain_client import Framed, one_shot, read_to_end, until

WRITES = """
import ctypes, os, subprocess, sys, warnings
print("imported")
def write():
    print("printed \\u2603", end="", flush=True)
    print(" in pieces\\n\\nnext", file=sys.stderr)
    warnings.warn("warned")
    os.write(1, b"bytes \\xff\\n")
    subprocess.run(["sh", "-c", "echo from a child; echo and its error >&2"])
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    sys.stdout.write("unfinished")
    sys.stdout.flush()
    return os.getpid()
def count(first, last):
    for number in range(first, last):
        print("line", number)
"""
TOP = 'log_format = "json"\nworkers = 2\nlimits.max_requests_per_minute = 0'


def expose(daemon: Daemon, top: str = TOP) -> Daemon:
    folder = daemon.folder / "helpers"
    if not folder.exists():
        write_modules(folder, writes=WRITES)
    daemon.write_config(f'{top}\n[[module_dirs]]\npath = "{folder}"\naffinity = "none"')
    return daemon


def objects(file: Path) -> list[dict[str, Any]]:
    """The log's lines so far. Fails when one is no object."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(line, dict) for line in lines)
    return lines


def said(daemon: Daemon, pid: int | None = None) -> list[str]:
    """What one process has written besides log lines, or all."""
    return [
        line["message"]
        for line in objects(daemon.log_file)
        if line.get("source") == "output" and pid in (None, line["pid"])
    ]


def numbers(daemon: Daemon) -> list[int]:
    return [int(text.split()[1]) for text in said(daemon) if text.startswith("line ")]


@pytest.fixture
def json_daemon(new_daemon: NewDaemon) -> Daemon:
    return expose(new_daemon()).run()


def test_whatever_modules_and_their_children_and_a_crash_write_is_objects(
    json_daemon: Daemon,
) -> None:
    daemon = json_daemon
    pid = daemon.call("writes", "write")
    until(lambda: "unfinished" in said(daemon, pid))
    texts = said(daemon, pid)
    for text in ("printed \u2603 in pieces", "next", "bytes \\xff", "from C"):
        assert text in texts
    assert any("UserWarning: warned" in text for text in texts)
    assert {"imported", "from a child", "and its error"} <= set(said(daemon)) - set(texts)
    one_shot(daemon.path, "os", "system", perl_caller="it.pl")
    with Framed(daemon.path) as client:
        client.send("probe", "segfault")
        assert read_to_end(client.socket) == b""
    until(lambda: "died: killed by signal 11" in daemon.log())
    until(lambda: any("in segfault" in text for text in said(daemon)))
    (event,) = [each for each in objects(daemon.log_file) if "security_event" in each]
    assert event["security_event"]["event"] == "module_not_allowed"
    assert event["security_event"]["perl_caller"] == "it.pl"
    assert event["message"].startswith("Security event: ")
    assert event["level"] == "WARNING"


def test_no_line_is_lost_when_log_processes_and_workers_are_killed(json_daemon: Daemon) -> None:
    daemon = json_daemon
    for begin in range(0, 1000, 200):
        (log_process,) = until(daemon.log_processes)
        os.kill(log_process, signal.SIGKILL)
        daemon.call("writes", "count", [begin, begin + 200])
    for pid in daemon.workers():
        os.kill(pid, signal.SIGKILL)
    until(lambda: set(numbers(daemon)) == set(range(1000)))
    assert daemon.stop() == 0
    objects(daemon.log_file)


def open_logs(pid: int) -> tuple[str, ...]:
    """The log files that a process has open; none when it has just ended."""
    files = set()
    with contextlib.suppress(FileNotFoundError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            files.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return tuple(each for each in files if "d.log" in each)


def test_output_follows_the_log_through_rotation_reloads_and_an_upgrade(
    json_daemon: Daemon,
) -> None:
    daemon = json_daemon
    old = daemon.folder / "d.log.1"

    def writes_to(file: Path, number: int) -> None:
        daemon.call("writes", "count", [number, number + 1])
        until(lambda: f"line {number}" in file.read_text())

    (before,) = until(daemon.log_processes)
    daemon.log_file.rename(old)
    os.kill(daemon.pid, signal.SIGUSR1)
    until(lambda: "Logs reopened" in daemon.log())
    until(lambda: before not in daemon.log_processes() and daemon.log_processes())
    writes_to(daemon.log_file, 1)
    daemon.upgrade()
    writes_to(daemon.log_file, 2)
    until(lambda: len(daemon.log_processes()) == 1)
    assert objects(old)
    assert objects(daemon.log_file)
    expose(daemon, TOP.replace("json", "text"))
    daemon.reload()
    until(lambda: not daemon.log_processes())
    writes_to(daemon.log_file, 3)
    assert "line 3" in daemon.log().splitlines()
    daemon.log_file.unlink()
    expose(daemon)
    daemon.reload()
    # For a moment there may be one that still writes to the file that was removed.
    until(lambda: {open_logs(pid) for pid in daemon.log_processes()} == {(str(daemon.log_file),)})
    writes_to(daemon.log_file, 4)
    assert daemon.stop() == 0


def test_a_module_that_writes_without_end_keeps_nothing_else_from_being_done(
    json_daemon: Daemon,
) -> None:
    daemon = json_daemon
    with Framed(daemon.path) as client:
        client.send("writes", "count", [0, 10**9])
        until(lambda: len(daemon.log()) > 1_000_000)
        assert daemon.status()["state"] == "running"
        assert daemon.call("test", "echo", [1]) == [1]
        assert daemon.stop(signal.SIGQUIT) == 0
    objects(daemon.log_file)


def test_the_numbers_of_descriptors_may_be_high(new_daemon: NewDaemon) -> None:
    """As they are with many workers: select(2) takes none above 1023."""
    daemon = expose(new_daemon(""))
    occupy = """
import os, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
while os.dup(0) < 1100:
    pass
for number in range(3, 1101):
    os.set_inheritable(number, True)
os.execvp(sys.argv[1], sys.argv[1:])
"""
    daemon.prefix = [sys.executable, "-c", occupy]
    started = daemon.command("start")
    assert started.returncode == 0, started
    one_shot(daemon.path, "writes", "write")
    until(lambda: "from C" in said(daemon))
    for command in ("check", "upgrade", "restart", "stop"):
        done = daemon.command(command)
        assert done.returncode == 0, done
    assert not [line for line in objects(daemon.log_file) if line["level"] == "ERROR"]
