"""The log: one record is one line and one write, whatever it contains."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.system.logs import (
    DescriptorHandler,
    JsonFormatter,
    LineFormatter,
    LogError,
)

# What a terminal or a reader of lines would not take for text.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
NASTY = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) + "\u2028\u2029"
FORMATTERS = [LineFormatter, JsonFormatter, logging.Formatter]


class Log:
    """A logger that writes to a pipe through the handler, and what it has written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.read_end, self.write_end = os.pipe()
        self.logger = logging.Logger("test")
        self.logger.addHandler(DescriptorHandler(self.write_end, formatter))

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)

    def written(self) -> bytes:
        return os.read(self.read_end, 1 << 20)


NewLog = Callable[[logging.Formatter], Log]


@pytest.fixture
def new_log() -> Iterator[NewLog]:
    logs: list[Log] = []

    def make(formatter: logging.Formatter) -> Log:
        logs.append(Log(formatter))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def one_line(data: bytes) -> str:
    text = data.decode()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    return text[:-1]


def test_a_line_has_the_time_the_level_and_the_message(new_log: NewLog) -> None:
    log = new_log(LineFormatter())
    log.logger.warning("Worker %d: %s", 3, "so it is")
    line = one_line(log.written())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[WARNING\] Worker 3: so it is", line)


@pytest.mark.parametrize("formatter", [LineFormatter, JsonFormatter])
def test_no_control_character_reaches_a_line(
    new_log: NewLog, formatter: type[logging.Formatter]
) -> None:
    log = new_log(formatter())
    log.logger.error("a%sb", NASTY)
    assert CONTROL.findall(log.written().decode()) == ["\n"]


@pytest.mark.parametrize("formatter", [LineFormatter, JsonFormatter])
@given(text=st.text())
def test_any_text_is_one_line(formatter: type[logging.Formatter], text: str) -> None:
    log = Log(formatter())
    try:
        log.logger.error("%s", text)
        one_line(log.written())
    finally:
        log.close()


def test_a_json_line_has_everything(new_log: NewLog) -> None:
    log = new_log(JsonFormatter())
    log.logger.info("said \u2603 and \udc80 and \n")
    line = json.loads(one_line(log.written()))
    assert line["message"] == "said \u2603 and \\udc80 and \n"
    assert line["level"] == "INFO"
    assert line["pid"] == os.getpid()
    assert isinstance(line["timestamp"], float)
    assert set(line) == {"timestamp", "level", "pid", "message"}


def fail(log: Log, message: str) -> None:
    try:
        raise ValueError(message)
    except ValueError:
        log.logger.exception("It failed")


def test_a_traceback_is_in_the_json_line(new_log: NewLog) -> None:
    log = new_log(JsonFormatter())
    fail(log, "why")
    line = json.loads(one_line(log.written()))
    assert line["message"] == "It failed"
    assert line["traceback"].endswith("ValueError: why")


def test_a_traceback_follows_the_line_of_text(new_log: NewLog) -> None:
    log = new_log(LineFormatter())
    fail(log, "why")
    lines = log.written().decode().splitlines()
    assert lines[0].endswith("[ERROR] It failed")
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-1] == "    ValueError: why"
    assert all(line.startswith("    ") for line in lines[1:])


def test_an_exceptions_text_cannot_pass_for_a_line_of_the_log(new_log: NewLog) -> None:
    log = new_log(LineFormatter())
    fail(log, "x\n2026-11-24 12:00:00 [CRITICAL] forged\r\x1b[2J")
    text = log.written().decode()
    assert not re.search(r"^2026-11-24 12:00:00", text, re.MULTILINE)
    assert not CONTROL.search(text.replace("\n", ""))


@pytest.mark.parametrize("formatter", FORMATTERS)
@pytest.mark.parametrize("text", ["a \udc80 b", "\ud800"])
def test_a_character_that_cannot_be_encoded_is_escaped(
    new_log: NewLog, formatter: type[logging.Formatter], text: str
) -> None:
    log = new_log(formatter())
    log.logger.error("%s", text)
    assert "\\udc80" in log.written().decode() or text == "\ud800"
    fail(log, text)
    assert log.written()


def test_a_record_is_one_write(new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []

    def write(_: int, data: bytes) -> int:
        writes.append(data)
        return len(data)

    for formatter in FORMATTERS:
        log = new_log(formatter())
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            log.logger.error("x" * 100_000)
            fail(log, "with a traceback")
    assert len(writes) == 2 * len(FORMATTERS)
    assert all(data.endswith(b"\n") for data in writes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EAGAIN])
def test_a_log_that_cannot_be_written_raises_nothing(
    new_log: NewLog, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    log = new_log(LineFormatter())

    def write(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        log.logger.error("lost")
    log.logger.error("written")
    assert "written" in log.written().decode()


def test_a_full_disk_raises_nothing() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    logger = logging.Logger("test")
    logger.addHandler(DescriptorHandler(descriptor, LineFormatter()))
    logger.error("lost")
    os.close(descriptor)
    logger.error("lost as well")


# -- configure, in a child process because it replaces standard error --


def run_configured(arguments: str, code: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import logging, os, sys\n"
        "from cpanbridge.supervisor.system import logs\n"
        f"logs.configure(logs.LogSettings({arguments}))\n"
        "log = logging.getLogger('cpanbridge.worker')\n"
        "security = logging.getLogger('cpanbridge.security')\n"
        f"{code}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_by_default_all_goes_to_standard_error() -> None:
    done = run_configured("'stderr', '-', 'text', False", "log.info('a'); security.warning('b')")
    first, second = done.stderr.splitlines()
    assert first.endswith("[INFO] a")
    assert second.endswith("[WARNING] b")
    assert done.stdout == ""


def test_a_log_file_takes_all_output_of_the_process(tmp_path: Path) -> None:
    file = tmp_path / "d.log"
    file.write_text("before\n")
    done = run_configured(
        f"{str(file)!r}, '-', 'text', False",
        "log.info('logged'); print('printed', flush=True); os.system('echo from a child')",
    )
    assert (done.stdout, done.stderr) == ("", "")
    lines = file.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1].endswith("[INFO] logged")
    assert lines[2:] == ["printed", "from a child"]


def test_security_events_go_only_to_their_own_file(tmp_path: Path) -> None:
    file = tmp_path / "security.log"
    done = run_configured(
        f"'stderr', {str(file)!r}, 'text', False", "security.warning('%s', '{}'); log.info('a')"
    )
    assert file.read_text() == "{}\n"
    assert len(done.stderr.splitlines()) == 1
    assert file.stat().st_mode & 0o007 == 0


@pytest.mark.parametrize(("debug", "lines"), [(False, 0), (True, 1)])
def test_debug_lines_come_with_debug(debug: bool, lines: int) -> None:
    done = run_configured(f"'stderr', '-', 'text', {debug}", "log.debug('a')")
    assert len(done.stderr.splitlines()) == lines


def test_json_format_is_json_on_every_line() -> None:
    done = run_configured("'stderr', '-', 'json', False", "log.info('a'); log.error('b')")
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["a", "b"]


@pytest.mark.parametrize("name", ["none/d.log", ""])
def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path, name: str) -> None:
    code = f"'{tmp_path}/{name}', '-', 'text', False"
    done = run_configured(code, "")
    assert LogError.__name__ in done.stderr
    assert f"{tmp_path}/{name}: cannot be opened for the log: " in done.stderr


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "d.log"
    done = run_configured(
        f"{str(file)!r}, '-', 'text', False",
        "pids = []\n"
        "for letter in 'abcd':\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        for _ in range(500): log.info(letter * 2000)\n"
        "        os._exit(0)\n"
        "    pids.append(pid)\n"
        "for pid in pids: os.waitpid(pid, 0)\n",
    )
    assert done.returncode == 0
    texts = [line.partition("[INFO] ")[2] for line in file.read_text().splitlines()]
    assert len(texts) == 2000
    assert set(texts) == {letter * 2000 for letter in "abcd"}


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_reader_that_has_stopped_blocks_no_writer(new_log: NewLog, size: int) -> None:
    log = new_log(logging.Formatter())

    def write() -> None:
        for _ in range(10_000):
            log.logger.warning("x" * size)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(30)
    assert not writer.is_alive()
