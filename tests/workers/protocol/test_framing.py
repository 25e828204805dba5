"""Frames: four bytes of length before each message; the first byte tells the two forms apart."""

import pytest

from cpanbridge.supervisor.config import MAX_REQUEST_SIZE
from cpanbridge.workers.protocol import framing


def test_a_frame_has_its_length_in_four_bytes_before_it() -> None:
    assert framing.to_frame(b"{}") == b"\x00\x00\x00\x02{}"
    assert framing.NO_MORE_REQUESTS == b"\x00\x00\x00\x00"


@pytest.mark.parametrize("length", [0, 1, MAX_REQUEST_SIZE])
def test_every_allowed_length_begins_a_framed_connection(length: int) -> None:
    assert framing.is_framed(framing.FRAME_HEADER.pack(length))


@pytest.mark.parametrize("first", [b"\t", b"\n", b"\r", b" ", b"{"])
def test_json_and_white_space_begin_a_one_shot_connection(first: bytes) -> None:
    assert not framing.is_framed(first)


def test_a_frame_is_whole_once_all_its_bytes_are_there() -> None:
    data = framing.to_frame(b"{}")
    for length in range(len(data)):
        assert framing.whole_frame(data[:length]) is None
    assert framing.whole_frame(data) == b"{}"
    assert framing.whole_frame(data + b"next") == b"{}"
