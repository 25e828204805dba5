"""Who is connected: each worker's first thousand, and who has been silent for too long."""

import pytest

from cpanbridge.supervisor.memory.connection_table import (
    IDLE,
    LISTED,
    READING,
    REPLYING,
    RUNNING,
    SIZE,
    STATUS_NAMES,
    WAITING,
    Connection,
    ConnectionTable,
    ConnectionTableWriter,
    RunningCall,
)

SECOND = 1_000_000_000


def new_roster() -> tuple[ConnectionTable, ConnectionTableWriter]:
    connection_table = ConnectionTable(memoryview(bytearray(SIZE)).cast("q"))
    return connection_table, ConnectionTableWriter(connection_table)


def test_a_connection_is_listed_from_its_beginning_to_its_end() -> None:
    connection_table, writer = new_roster()
    assert connection_table.connections() == []
    entry = writer.enter(7, 100)
    assert connection_table.connections() == [Connection(7, 100, 100, 0, READING)]
    writer.leave(entry)
    assert connection_table.connections() == []


def test_what_a_connection_does_is_told() -> None:
    connection_table, writer = new_roster()
    entry = writer.enter(1, 100)

    def seen() -> Connection:
        (connection,) = connection_table.connections()
        return connection

    writer.heard(entry, 110)
    assert seen() == Connection(1, 100, 110, 0, READING)
    writer.is_doing(entry, WAITING)
    assert seen() == Connection(1, 100, 110, 0, WAITING)
    writer.runs(entry, 0, 0, None)
    assert seen() == Connection(1, 100, 110, 1, RUNNING)
    writer.ran(entry, 150)
    assert seen() == Connection(1, 100, 150, 1, REPLYING)
    writer.is_doing(entry, IDLE)
    writer.heard(entry, 200)
    writer.runs(entry, 0, 0, None)
    assert seen() == Connection(1, 100, 200, 2, RUNNING)


def test_what_runs_is_told_with_its_client_as_long_as_it_runs() -> None:
    connection_table, writer = new_roster()
    first, second = writer.enter(1, 100), writer.enter(2, 100)
    assert connection_table.running() == []
    writer.runs(first, 3, 4711, "caf\xe9.pl")
    writer.runs(second, 4, 0, "x" * 200)
    found = sorted(connection_table.running())
    assert found[0] == RunningCall(3, 4711, "caf\xe9.pl")
    assert found[1] == RunningCall(4, 0, "x" * 112)
    writer.ran(second, 150)
    writer.leave(second)
    assert connection_table.running() == found[:1]
    writer.runs(first, 5, 4711, None)
    assert connection_table.running() == [RunningCall(5, 4711, "")]


def test_each_status_has_a_name() -> None:
    assert set(STATUS_NAMES) == {READING, WAITING, RUNNING, REPLYING, IDLE}
    assert len(set(STATUS_NAMES.values())) == 5


def test_an_entry_that_is_used_again_remembers_nothing() -> None:
    connection_table, writer = new_roster()
    entry = writer.enter(1, 100)
    writer.runs(entry, 0, 0, None)
    writer.leave(entry)
    assert writer.enter(2, 300) == entry
    assert connection_table.connections() == [Connection(2, 300, 300, 0, READING)]


def test_those_beyond_the_first_thousand_are_served_and_not_listed() -> None:
    connection_table, writer = new_roster()
    entries = [writer.enter(number, number) for number in range(1, LISTED + 1)]
    assert len(set(entries)) == LISTED
    unlisted = [writer.enter(number, number) for number in range(LISTED + 1, LISTED + 4)]
    for entry in unlisted:
        writer.heard(entry, 1)
        writer.runs(entry, 0, 0, None)
        writer.ran(entry, 2)
    assert sorted(c.number for c in connection_table.connections()) == list(range(1, LISTED + 1))
    writer.leave(unlisted[0])
    writer.leave(entries[5])
    assert sorted(c.number for c in connection_table.connections()) == [
        *range(1, 6),
        *range(7, LISTED + 1),
    ]
    assert writer.enter(5000, 9) == entries[5]  # the place that came free, and the only one
    assert writer.enter(5001, 9) == unlisted[0]
    for entry in [*entries, *unlisted]:
        writer.leave(entry)
    assert connection_table.connections() == []
    assert writer.enter(6000, 9) in entries


def test_a_dead_workers_connections_are_forgotten_and_its_place_is_as_new() -> None:
    connection_table, writer = new_roster()
    for number in range(1, LISTED + 10):
        writer.enter(number, 100)
    connection_table.clear()
    assert connection_table.connections() == []
    replacement = ConnectionTableWriter(connection_table)
    replacement.enter(77, 500)
    assert connection_table.connections() == [Connection(77, 500, 500, 0, READING)]


@pytest.mark.parametrize(
    ("status", "may_be_stale"),
    [(READING, True), (IDLE, True), (WAITING, False), (RUNNING, False), (REPLYING, False)],
)
def test_a_client_is_stale_only_when_it_is_silent_at_its_own_turn(
    status: int, may_be_stale: bool
) -> None:
    connection_table, writer = new_roster()
    entry = writer.enter(1, 0)
    writer.heard(entry, 10 * SECOND)
    writer.is_doing(entry, status)
    (connection,) = connection_table.connections()
    for now, silent in ((10 * SECOND, False), (310 * SECOND, False), (310 * SECOND + 1, True)):
        stale = silent and may_be_stale
        assert connection.is_stale(now, 300) is stale
