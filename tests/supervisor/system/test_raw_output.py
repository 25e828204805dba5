"""What processes write becomes lines, however it is cut, and no line is lost."""

import json
import math
import os
import signal
import threading
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st
from plain_client import until

from cpanbridge.supervisor.system import raw_output
from cpanbridge.supervisor.system.raw_output import LONGEST_LINE, UNFINISHED_SECONDS, Lines

PIECES = st.lists(st.tuples(st.integers(1, 3), st.text("ab\n").map(str.encode)))


@given(PIECES)
def test_lines_of_several_processes_are_whole_however_they_are_cut(
    pieces: list[tuple[int, bytes]],
) -> None:
    lines = Lines()
    written: dict[int, bytes] = defaultdict(bytes)
    found: dict[int, list[bytes]] = defaultdict(list)
    for pid, piece in pieces:
        written[pid] += piece
        found[pid] += lines.add(pid, piece, 0.0)
    for pid, line in lines.given_up(math.inf):
        found[pid].append(line)
    assert lines.seconds_left(0.0) is None
    for pid, text in written.items():
        assert [each for each in found[pid] if each] == [each for each in text.split(b"\n") if each]


def test_a_long_line_is_several_and_an_unfinished_one_is_not_kept_for_long() -> None:
    lines = Lines()
    text = b"x" * (2 * LONGEST_LINE + 5)
    assert list(map(len, lines.add(1, text, 10.0))) == [LONGEST_LINE, LONGEST_LINE]
    assert lines.seconds_left(10.5) == UNFINISHED_SECONDS - 0.5
    assert list(lines.given_up(10.5)) == []
    assert list(lines.given_up(10.0 + UNFINISHED_SECONDS)) == [(1, b"x" * 5)]
    assert list(lines.add(1, b"y\n", 12.0)) == [b"y"]
    cut = list(lines.add(1, b"x" + "\u2603".encode() * LONGEST_LINE + b"\n", 12.0))
    assert b"".join(cut).decode() == "x" + "\u2603" * LONGEST_LINE
    assert all(piece.decode() and len(piece) <= LONGEST_LINE for piece in cut)


def _write_all(descriptor: int, text: str) -> None:
    os.write(descriptor, f"{text}\n".encode())


def test_what_one_log_process_has_not_written_the_next_one_writes() -> None:
    """One is killed again and again while thousands of lines come, and the writer ends first."""
    ours, theirs = raw_output.pair()
    read_end, write_end = os.pipe()
    found: list[bytes] = []

    def read() -> None:
        with open(read_end, "rb") as stream:
            found.extend(stream)

    def start() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                theirs.close()
                raw_output.copy(ours, lambda text: _write_all(write_end, text))
            finally:
                os._exit(0)
        return pid

    reader = threading.Thread(target=read)
    writer = os.fork()
    if writer == 0:
        for number in range(3000):
            os.write(theirs.fileno(), b"%d\n" % number)
        os._exit(0)
    reader.start()
    copier = start()
    for seen in range(100, 1500, 100):
        until(lambda seen=seen: len(found) >= seen)
        os.kill(copier, signal.SIGKILL)
        os.waitpid(copier, 0)
        copier = start()
    os.waitpid(writer, 0)
    theirs.close()
    os.waitpid(copier, 0)
    os.close(write_end)
    ours.close()
    reader.join()
    lines = [json.loads(line) for line in found]
    assert {line["pid"] for line in lines} == {writer}
    assert sorted({int(line["message"]) for line in lines}) == list(range(3000))
