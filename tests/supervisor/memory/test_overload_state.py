"""Which limits the load is near or over, in the document's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.memory.overload_state import CLOSING, Kind, Level, Reading, at_level

kinds = pytest.mark.parametrize("kind", list(Kind))


@kinds
@pytest.mark.parametrize(
    ("value", "level"),
    [
        (0, Level.NORMAL),
        (799.9, Level.NORMAL),
        (800, Level.NORMAL),
        (800.1, Level.WARNING),
        (1000, Level.WARNING),
        (1000.1, Level.VIOLATION),
        (1e9, Level.VIOLATION),
    ],
)
def test_over_80_percent_is_a_warning_and_over_100_a_violation(
    kind: Kind, value: float, level: Level
) -> None:
    assert Reading(kind, value, 1000).level is level


@kinds
@given(st.floats(0, 1e12))
def test_a_limit_of_0_is_none(kind: Kind, value: float) -> None:
    assert Reading(kind, value, 0).level is Level.NORMAL


@given(st.integers(1, 10**7), st.integers(0, 2 * 10**7))
def test_every_limit_is_compared_exactly(limit: int, value: int) -> None:
    expected = (10 * value > 8 * limit) + (value > limit)
    assert Reading(Kind.REQUESTS, value, limit).level == expected


def test_only_memory_and_cpu_close_the_gate() -> None:
    assert set(CLOSING) == {Kind.MEMORY, Kind.CGROUP_MEMORY, Kind.CPU}


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (
            Reading(Kind.MEMORY, 856.3, 1024),
            "Memory usage 856.3MB approaching limit 1024MB",
        ),
        (
            Reading(Kind.MEMORY, 1100.04, 1024),
            "Memory usage 1100.0MB exceeds limit 1024MB",
        ),
        (
            Reading(Kind.CGROUP_MEMORY, 1900, 1800),
            "Memory of the cgroup 1900.0MB exceeds limit 1800MB",
        ),
        (Reading(Kind.CPU, 175.2, 200.0), "CPU usage 175.2% approaching limit 200%"),
        (Reading(Kind.CPU, 250, 200.0), "CPU usage 250.0% exceeds limit 200%"),
        (Reading(Kind.CPU, 90, 62.5), "CPU usage 90.0% exceeds limit 62.5%"),
        (Reading(Kind.REQUESTS, 1234, 1000), "Request rate 1234/min exceeds limit 1000/min"),
        (Reading(Kind.REQUESTS, 900, 1000), "Request rate 900/min approaching limit 1000/min"),
        (Reading(Kind.CONCURRENT, 52, 50), "Concurrent requests 52 exceeds limit 50"),
        (Reading(Kind.CONCURRENT, 45, 50), "Concurrent requests 45 approaching limit 50"),
        (Reading(Kind.CONNECTIONS, 101, 100), "Connections 101 exceeds limit 100"),
    ],
)
def test_it_is_told_in_the_documents_words(reading: Reading, words: str) -> None:
    assert str(reading) == words


def test_the_words_of_a_level_are_those_of_its_readings_alone() -> None:
    readings = [
        Reading(Kind.MEMORY, 100, 1024),
        Reading(Kind.CPU, 175.2, 200),
        Reading(Kind.REQUESTS, 1234, 1000),
        Reading(Kind.CONCURRENT, 52, 50),
        Reading(Kind.CONNECTIONS, 7, 0),
    ]
    assert at_level(readings, Level.VIOLATION) == [
        "Request rate 1234/min exceeds limit 1000/min",
        "Concurrent requests 52 exceeds limit 50",
    ]
    assert at_level(readings, Level.WARNING) == ["CPU usage 175.2% approaching limit 200%"]
