"""The end of a one-shot request is found exactly, in linear time, however it is cut."""

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.workers.protocol.scanner import ObjectScanner

# Texts in which the bytes that matter to a scanner are frequent.
TEXT = st.text(st.sampled_from('{}[]"\\,: a\n\u2603\U0001f600') | st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=5)


def encoded(value: object, ascii_only: bool, indent: int | None) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at the given places, without empty pieces."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(
    OBJECTS,
    st.booleans(),
    st.sampled_from([None, 1]),
    st.text(" \t\r\n", max_size=5),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_any_object_cut_anywhere_ends_with_its_last_byte(
    value: dict[str, object], ascii_only: bool, indent: int | None, before: str, cuts: list[int]
) -> None:
    data = before.encode() + encoded(value, ascii_only, indent)
    scanner = ObjectScanner()
    for piece in pieces_of(data[:-1], cuts):
        assert not scanner.feed(piece)
    assert scanner.feed(data[-1:])


@given(OBJECTS, st.booleans())
def test_any_object_cut_into_single_bytes_ends_with_its_last_byte(
    value: dict[str, object], ascii_only: bool
) -> None:
    data = encoded(value, ascii_only, None)
    scanner = ObjectScanner()
    ends = [scanner.feed(data[n : n + 1]) for n in range(len(data))]
    assert ends == [False] * (len(data) - 1) + [True]


@given(OBJECTS, st.binary(max_size=50))
def test_what_follows_in_the_same_piece_does_not_hide_the_end(
    value: dict[str, object], after: bytes
) -> None:
    assert ObjectScanner().feed(encoded(value, False, None) + after)


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=20))
def test_garbage_raises_nothing(pieces: list[bytes]) -> None:
    scanner = ObjectScanner()
    for piece in pieces:
        if scanner.feed(piece):
            break


@pytest.mark.parametrize("garbage", [b"x", b"[", b"}", b'"{', b"\\{", b"\xff\xfe{", b"  ]"])
def test_what_is_no_object_ends_at_once(garbage: bytes) -> None:
    assert ObjectScanner().feed(garbage)


def test_white_space_alone_is_not_the_end() -> None:
    scanner = ObjectScanner()
    for piece in (b" ", b"\r\n\t ", b"\n"):
        assert not scanner.feed(piece)
    assert scanner.feed(b"{}")


def seconds_for(pattern: bytes, size: int, cut: int) -> float:
    """Processor time to scan `{` and `size` bytes of a pattern, in pieces of `cut`; best of 3."""
    data = b"{" + pattern * (size // len(pattern))
    best = float("inf")
    for _ in range(3):
        scanner = ObjectScanner()
        began = time.process_time()
        for at in range(0, len(data), cut):
            scanner.feed(data[at : at + cut])
        best = min(best, time.process_time() - began)
    return best


@pytest.mark.parametrize(
    "pattern",
    [b"\\", b'"', b'\\"', b"{", b'"{', b" ", b"a", b'"\\\\"{'],
    ids=["backslashes", "quotes", "escaped", "braces", "both", "white space", "plain", "mixed"],
)
def test_the_time_is_linear_whatever_the_bytes(pattern: bytes) -> None:
    small, large = (seconds_for(pattern, size, cut=100) for size in (1 << 17, 1 << 19))
    # Four times is linear and sixteen quadratic; the tenth of a second is for noise.
    assert large < 8 * small + 0.1
