"""The last few notes of each worker: whole or not there, even when the writer is killed."""

import itertools
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.event_ring import EVENTS, SIZE, Event, EventRing
from cpanbridge.supervisor.memory.layout import Shared


def new_ring() -> EventRing:
    return EventRing(memoryview(bytearray(SIZE)))


def test_notes_are_read_the_newest_first() -> None:
    ring = new_ring()
    assert ring.read() == []
    ring.add(100, 1, -2, "the first")
    ring.add(50, -3, 4, "")  # the wall clock was set back: the order is that of writing
    assert ring.read() == [Event(50, -3, 4, ""), Event(100, 1, -2, "the first")]


def test_a_new_note_takes_the_place_of_the_oldest() -> None:
    ring = new_ring()
    for number in range(5 * EVENTS + 3):
        ring.add(number, number, 0, f"note {number}")
        expected = range(number, max(-1, number - EVENTS), -1)
        assert [event.text for event in ring.read()] == [f"note {n}" for n in expected]


def test_a_replacement_goes_on_where_the_dead_one_stopped() -> None:
    memory = memoryview(bytearray(SIZE))
    for number in range(EVENTS + 5):
        EventRing(memory).add(number, 0, 0, f"note {number}")
    assert [event.at for event in EventRing(memory).read()] == list(range(EVENTS + 4, 4, -1))


@given(st.text(max_size=500))
def test_a_long_text_is_cut_after_a_whole_character(text: str) -> None:
    ring = new_ring()
    ring.add(1, 2, 3, "before")
    ring.add(1, 2, 3, text)
    (event, before) = ring.read()
    assert text.startswith(event.text)
    if len(text.encode()) <= 300:
        assert event.text == text
    else:
        assert len(event.text.encode()) > 300
    assert before.text == "before"


@pytest.mark.parametrize("character", ["x", "\u00e4", "\u2603", "\U0001f600"])
def test_the_cut_never_halves_a_character(character: str) -> None:
    for shift in range(4):
        ring = new_ring()
        ring.add(1, 2, 3, "x" * shift + 1000 * character)
        assert set(ring.read()[0].text) <= {"x", character}


def test_what_is_no_character_is_shown_escaped() -> None:
    ring = new_ring()
    ring.add(1, 2, 3, "half \ud83d of one")
    assert ring.read()[0].text == "half \\ud83d of one"


# -- whole or not at all --


class Watched:
    """A ring's memory, with something done before each store into it."""

    def __init__(self, memory: memoryview, before_store: object) -> None:
        self.memory = memory
        self.before_store = before_store

    def __getitem__(self, key: object) -> object:
        return self.memory[key]  # type: ignore[call-overload]

    def __setitem__(self, key: object, value: object) -> None:
        assert callable(self.before_store)
        self.before_store()
        self.memory[key] = value  # type: ignore[call-overload]


def watch(ring: EventRing, before_store: object) -> None:
    """From now on call `before_store` before each store of the ring's writer."""
    ring._text = Watched(ring._text, before_store)  # type: ignore[assignment]
    ring._numbers = Watched(ring._numbers, before_store)  # type: ignore[assignment]


@pytest.mark.parametrize("already", [0, 3, EVENTS, EVENTS + 3])
def test_a_note_is_never_seen_half_written(already: int) -> None:
    memory = memoryview(bytearray(SIZE))
    writer, reader = EventRing(memory), EventRing(memory)
    before = [Event(n, n, n, f"note {n}" * 9) for n in range(already)]
    for event in before:
        writer.add(*event)
    looks = []
    watch(writer, lambda: looks.append(reader.read()))
    writer.add(-1, -1, -1, "the new one" * 20)
    looks.append(reader.read())
    assert len(looks) > 6
    kept = before[::-1][:EVENTS]
    for look in looks[:-1]:
        # At most the oldest, which it replaces, is missing.
        assert look in (kept, kept[: EVENTS - 1])
    assert looks[-1] == [Event(-1, -1, -1, "the new one" * 20), *kept[: EVENTS - 1]]


def test_a_note_that_is_replaced_while_it_is_read_is_not_told_as_a_mixture() -> None:
    memory = memoryview(bytearray(SIZE))
    writer, reader = EventRing(memory), EventRing(memory)

    class Slow:
        """The text is fetched only after the writer has been all around the ring."""

        def __getitem__(self, key: slice) -> bytes:
            for _ in range(EVENTS):
                writer.add(2, 2, 2, "new")
            return bytes(memory[key])

    for _ in range(EVENTS):
        writer.add(1, 1, 1, "old and longer")
    reader._text = Slow()  # type: ignore[assignment]
    for event in reader.read():
        assert event in (Event(1, 1, 1, "old and longer"), Event(2, 2, 2, "new"))


def test_a_writer_that_is_killed_over_a_note_leaves_the_others() -> None:
    shared = Shared.create(1, Limits())
    ring = shared.statistics[0].errors
    for number in range(EVENTS):
        ring.add(number, 0, 0, f"note {number}")
    step, killed, written = 0, True, [f"note {number}" for number in range(EVENTS)][::-1]
    while killed:
        pid = os.fork()
        if pid == 0:
            left = step

            def die() -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            watch(ring, die)
            ring.add(-1, -1, -1, "never seen")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        killed = status == -signal.SIGKILL
        assert killed or status == 0
        seen = [event.text for event in ring.read()]
        if killed:
            assert seen in (written, written[: EVENTS - 1])
            ring.add(step, 0, 0, f"after {step}")  # the next worker in the slot
            written = [f"after {step}", *written[: EVENTS - 1]]
            assert [event.text for event in ring.read()] == written
        else:
            assert seen == ["never seen", *written[: EVENTS - 1]]
        step += 1
    assert step > 6
    os.close(shared.fd)


def test_in_whatever_order_the_stores_are_seen_a_note_is_whole_or_not_there() -> None:
    """A machine may show any of them, and not the others."""
    memory = memoryview(bytearray(SIZE))
    writer = EventRing(memory)
    before = [Event(n, n, n, f"note {n}" * 9) for n in range(EVENTS)]
    for event in before:
        writer.add(*event)
    images = [bytes(memory)]
    watch(writer, lambda: images.append(bytes(memory)))
    writer.add(-1, -1, -1, "the new one" * 20)
    images.append(bytes(memory))
    stores = [
        {at: new for at, (old, new) in enumerate(zip(*pair, strict=True)) if old != new}
        for pair in itertools.pairwise(images)
    ]
    kept = before[::-1]
    for seen in itertools.product([False, True], repeat=len(stores)):
        image = bytearray(images[0])
        for store in itertools.compress(stores, seen):
            for at, new in store.items():
                image[at] = new
        found = EventRing(memoryview(image)).read()
        assert found in (kept, kept[:-1], [Event(-1, -1, -1, "the new one" * 20), *kept[:-1]])
