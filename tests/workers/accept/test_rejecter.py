"""Clients that find no room are told so in the form that they speak, and none is waited for."""

import errno
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from plain_client import read_to_end, request, until
from running_out import no_descriptors, no_threads

from cpanbridge.supervisor.gate import MOST_REJECTED as PLACES
from cpanbridge.workers.accept import rejecter as turnstile_module
from cpanbridge.workers.accept.rejecter import Rejecter

NO_MORE_REQUESTS = struct.pack(">I", 0)
FOREVER = 600.0


def answer(request_id: str | None) -> bytes:
    """As the worker's, and not ASCII."""
    told = {"error": "no room \u2603", "request_id": request_id}
    return json.dumps(told, ensure_ascii=False).encode()


class Exit:
    """A rejecter and the clients who were sent there."""

    def __init__(self) -> None:
        self.rejecter = Rejecter(answer)
        self.ends: list[socket.socket] = []

    def client(self, data: bytes = b"") -> socket.socket:
        """The client's end of a connection that was turned away."""
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        if data:
            ours.sendall(data)
        self.ends.append(ours)
        self.rejecter.can_take()  # which starts its thread
        self.rejecter.take(theirs)
        return ours

    @property
    def inside(self) -> int:
        return self.rejecter._rejected


@pytest.fixture
def way_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exit]:
    # Nobody is closed for being slow, but where a test says so.
    monkeypatch.setattr(turnstile_module, "FIRST_BYTES_SECONDS", FOREVER)
    monkeypatch.setattr(turnstile_module, "LINGER_SECONDS", FOREVER)
    way_out = Exit()
    yield way_out
    for end in way_out.ends:
        end.close()
    until(lambda: way_out.inside == 0)


def one_shot(request_id: str) -> bytes:
    return json.dumps(request("m", "f", request_id=request_id)).encode()


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def decoded(reply: bytes) -> dict[str, Any]:
    assert reply.isascii()
    told: dict[str, Any] = json.loads(reply)
    return told


def unframed(reply: bytes) -> dict[str, Any]:
    """The one answer in a framed reply, after which nothing more will be read."""
    (length,) = struct.unpack(">I", reply[:4])
    assert reply[4 + length :] == NO_MORE_REQUESTS
    told: dict[str, Any] = json.loads(reply[4 : 4 + length])
    return told


def test_a_one_shot_client_is_told_with_its_request_id(way_out: Exit) -> None:
    client = way_out.client(data=one_shot("r-1"))
    told = decoded(read_to_end(client))
    assert told == {"error": "no room \u2603", "request_id": "r-1"}


def test_a_framed_client_is_told_with_its_request_id(way_out: Exit) -> None:
    client = way_out.client(data=frame(one_shot("r-2")) + frame(one_shot("r-3")))
    told = unframed(read_to_end(client))
    assert told == {"error": "no room \u2603", "request_id": "r-2"}


@pytest.mark.parametrize(
    "data",
    [b"{", b' {"module": "m"', b"\n\n", b"what is this?", b"\xff\xfe", b'{"request_id": 5}'],
)
def test_who_has_sent_less_than_a_request_is_told_without_one(way_out: Exit, data: bytes) -> None:
    assert decoded(read_to_end(way_out.client(data=data)))["request_id"] is None


@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
def test_who_has_sent_less_than_a_frame_is_told_without_one(way_out: Exit, length: int) -> None:
    client = way_out.client(data=frame(one_shot("r-4"))[:length])
    assert unframed(read_to_end(client))["request_id"] is None


def test_who_sends_later_is_told_then_and_keeps_nobody_waiting(way_out: Exit) -> None:
    slow = way_out.client()
    assert decoded(read_to_end(way_out.client(data=one_shot("quick"))))["request_id"] == "quick"
    slow.sendall(one_shot("slow"))
    assert decoded(read_to_end(slow))["request_id"] == "slow"


def test_who_leaves_without_a_word_is_seen_out(way_out: Exit) -> None:
    clients = [way_out.client() for _ in range(5)]
    until(lambda: way_out.inside == 5)
    for client in clients:
        client.close()
    until(lambda: way_out.inside == 0)


def test_who_is_silent_is_closed_after_a_while(
    way_out: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turnstile_module, "FIRST_BYTES_SECONDS", 0.05)
    silent = [way_out.client() for _ in range(3)]
    assert [read_to_end(client) for client in silent] == [b"", b"", b""]
    until(lambda: way_out.inside == 0)


def test_who_is_silent_has_to_go_sooner_when_all_places_are_taken(
    way_out: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turnstile_module, "FIRST_BYTES_SECONDS", 600)
    monkeypatch.setattr(turnstile_module, "CROWDED_SECONDS", 0.05)
    patient = [way_out.client() for _ in range(PLACES - 1)]
    assert not select.select(patient, [], [], 0.2)[0]
    last = way_out.client()
    assert read_to_end(patient[0]) == b""
    assert last.fileno() >= 0  # it came later, and may have some time yet


def test_who_has_been_told_may_end_what_it_was_sending(way_out: Exit) -> None:
    """Closed with bytes unread, it would get an error instead of the answer."""
    client = way_out.client(data=b'{"module": "m", "params": "')
    for _ in range(50):
        client.sendall(b"x" * 100_000)
    client.sendall(b'"}')
    assert decoded(read_to_end(client))["request_id"] is None
    assert way_out.inside == 1  # it has not ended its side
    client.shutdown(socket.SHUT_WR)
    until(lambda: way_out.inside == 0)


def test_who_never_ends_is_closed_after_a_while(
    way_out: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turnstile_module, "LINGER_SECONDS", 0.05)
    client = way_out.client(data=one_shot("r-6"))
    assert decoded(read_to_end(client))["request_id"] == "r-6"
    until(lambda: way_out.inside == 0)
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        client.sendall(b"x")


def test_who_is_reset_or_gone_before_it_is_answered_harms_nobody(way_out: Exit) -> None:
    for _ in range(20):
        client = way_out.client(data=one_shot("gone"))
        client.close()
    until(lambda: way_out.inside == 0)
    assert decoded(read_to_end(way_out.client(data=one_shot("r-7"))))["request_id"] == "r-7"


def test_there_are_places_for_so_many_and_each_comes_free_again(way_out: Exit) -> None:
    rejecter = way_out.rejecter
    clients = []
    while rejecter.can_take():
        clients.append(way_out.client())
    assert len(clients) == PLACES
    for number, client in enumerate(clients):
        client.sendall(one_shot(f"r-{number}"))
    for number, client in enumerate(clients):
        assert decoded(read_to_end(client))["request_id"] == f"r-{number}"
    assert not rejecter.can_take()  # they have not ended yet
    clients[0].close()
    until(rejecter.can_take)
    for client in clients:
        client.close()
    until(lambda: way_out.inside == 0)


def test_more_than_are_expected_are_answered_all_the_same(way_out: Exit) -> None:
    clients = [way_out.client(data=one_shot(f"r-{n}")) for n in range(3 * PLACES)]
    told = [decoded(read_to_end(client))["request_id"] for client in clients]
    assert told == [f"r-{n}" for n in range(3 * PLACES)]


def test_one_thread_serves_all_and_none_is_started_before(way_out: Exit) -> None:
    def threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t is way_out.rejecter._thread]

    assert way_out.rejecter._thread is None
    for number in range(10):
        read_to_end(way_out.client(data=one_shot(f"r-{number}")))
    assert len(threads()) == 1


def in_a_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_worker_that_leaves_waits_until_all_are_out(way_out: Exit) -> None:
    way_out.rejecter.wait_until_empty(FOREVER)  # nobody is there
    client = way_out.client(data=one_shot("r-8"))
    waiting = in_a_thread(lambda: way_out.rejecter.wait_until_empty(FOREVER))
    waiting.join(0.1)
    assert waiting.is_alive()
    client.close()
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("seconds", [0.05, 0.0, -1.0])
def test_but_not_for_longer_than_it_has(way_out: Exit, seconds: float) -> None:
    way_out.client()
    waiting = in_a_thread(lambda: way_out.rejecter.wait_until_empty(seconds))
    waiting.join(60)
    assert not waiting.is_alive()
    assert way_out.inside == 1


def test_without_a_thread_none_is_taken_until_one_can_be_started(way_out: Exit) -> None:
    with no_threads():
        assert not way_out.rejecter.can_take()
    assert way_out.rejecter.can_take()


def test_a_client_is_answered_without_a_descriptor_left(way_out: Exit) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, no_descriptors():
        ours.sendall(one_shot("a"))
        assert way_out.rejecter.can_take()
        way_out.rejecter.take(theirs)
        assert decoded(read_to_end(ours))["request_id"] == "a"


def test_a_client_that_cannot_be_watched_is_closed_and_its_place_free(
    way_out: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_watch_left(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(way_out.rejecter._selector, "register", no_watch_left)
    assert way_out.client().recv(1) == b""
    until(lambda: way_out.inside == 0)
