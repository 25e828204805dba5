"""What the kernel refuses is told as a sentence, in the kernel's words and with advice."""

import errno
import os
import resource
import subprocess

import pytest
from conftest import COMMAND, NewDaemon

from cpanbridge.supervisor.wording import count_of, explain, explain_start


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "can be written"),
    ],
)
def test_it_has_the_kernels_words_and_advice(number: int, advice: str) -> None:
    words = explain(OSError(number, os.strerror(number)))
    assert words.startswith(f"{os.strerror(number)}: ")
    assert advice in words
    assert "Errno" not in words


def test_a_process_that_may_not_be_started_is_a_limit() -> None:
    error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    assert "ulimit -u" in explain_start(error)
    assert explain(error) == os.strerror(errno.EAGAIN)


def test_one_is_not_many() -> None:
    assert [count_of(number, "worker") for number in range(3)] == [
        *("0 workers", "1 worker", "2 workers")
    ]
    assert count_of(2, "process", "processes") == "2 processes"


def test_an_error_without_a_number_is_told_in_its_own_words() -> None:
    assert explain(OSError("timed out")) == "timed out"


def test_a_command_without_descriptors_says_so_in_one_line(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    done = subprocess.run(
        # Few enough that modules are imported and no pipe can be made.
        [COMMAND, "start", "--config", str(daemon.config)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5)),
        capture_output=True,
        encoding="utf-8",
        env=daemon.environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("cpanbridged: ")
    assert "Too many open files: raise this process's limit (ulimit -n" in done.stderr
