"""A client on its way to another worker is always one side's, whoever is killed when."""

import math
import os
import select
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
from conftest import take_down
from killing import kill_at

from cpanbridge.supervisor import postbox
from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Bells, Gate
from cpanbridge.supervisor.shared import Shared
from cpanbridge.supervisor.tickets import TICKETS
from cpanbridge.workers import outgoing
from cpanbridge.workers.handover import MOST_INLINE
from cpanbridge.workers.incoming import Incoming
from cpanbridge.workers.journey import Fate, Journey, Passenger
from cpanbridge.workers.outgoing import Outgoing
from cpanbridge.workers.peer import Peer

SENDER, RECEIVER = 0, 1
DATA = b'{"module": "m", "function": "f"}'


class Client(NamedTuple):
    """A connection: the worker's end, and the end of the process that calls."""

    near: socket.socket
    far: socket.socket

    def journey(
        self,
        shared: Shared,
        data: bytes = DATA,
        until: float = math.inf,
        may_be_dismissed: bool = True,
    ) -> Peer:
        """The client as its sender has it, when it is about to be put into the postbox."""
        shared.slots[SENDER].opened += 1
        peer = Peer(self.near.fileno(), 0, _socket=self.near)
        passenger = Passenger(self.near.fileno(), data, 123, 4, 5.5, may_be_dismissed)
        peer.journey = Journey(passenger, shared.owner(RECEIVER), until, known=True)
        return peer

    def hears(self) -> bytes | None:
        """What has come for the process that calls; None: nothing yet."""
        if not select.select([self.far], [], [], 0)[0]:
            return None
        return self.far.recv(100)


class House:
    """Two workers' memory and bells, and clients."""

    def __init__(self) -> None:
        self.shared = Shared.create(2, Limits())
        self.bells = [Bells.hang() for _ in self.shared.slots]
        self.gates = [Gate(self.shared, slot, self.bells) for slot in (SENDER, RECEIVER)]
        self.taken: list[Peer] = []
        self.outgoing = Outgoing(self.shared, SENDER, self.bells, self._let_go)
        self.incoming = Incoming(self.shared, RECEIVER, self.bells, self.gates[RECEIVER])

    def _let_go(self, peer: Peer) -> None:
        self.taken.append(peer)
        peer.socket.close()
        self.gates[SENDER].closed()

    def close(self) -> None:
        """Leave nothing open."""
        for box in (self.incoming._box, *self.outgoing._boxes.values()):
            box.detach()
        take_down(self.bells)
        os.close(self.outgoing.descriptor)
        os.close(self.shared.fd)

    def dies(self, slot: int) -> None:
        """What the master does when a worker has ended."""
        self.shared.clear(self.shared.slots[slot])
        postbox.throw_away(self.bells[slot].take)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


@pytest.fixture
def client() -> Iterator[Client]:
    near, far = socket.socketpair()
    yield Client(near, far)
    near.close()
    far.close()


def serve(found: tuple[Passenger, int] | None) -> None:
    """What the receiver does with a client."""
    if found is not None:
        passenger, _ = found
        with socket.socket(fileno=passenger.descriptor) as client:
            client.sendall(b"served")
            client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("may_be_dismissed", [True, False])
@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE, MOST_INLINE + 1, 3_000_000])
def test_a_client_arrives_with_all_that_is_known_of_it(
    house: House, client: Client, size: int, may_be_dismissed: bool
) -> None:
    data = os.urandom(size)
    peer = client.journey(house.shared, data, may_be_dismissed=may_be_dismissed)
    house.outgoing.put(peer)
    assert house.outgoing.count == 1
    found = house.incoming.next()
    assert found is not None
    passenger, number = found
    assert passenger[1:] == (data, 123, 4, 5.5, may_be_dismissed)
    assert number == 1
    house.outgoing.settle()
    assert house.taken == [peer]
    assert house.outgoing.count == 0
    assert house.shared.connections() == 1
    serve(found)
    assert client.hears() == b"served"


def test_a_client_is_the_senders_again_when_it_is_withdrawn(house: House, client: Client) -> None:
    peer = client.journey(house.shared, until=time.monotonic() - 1)
    house.outgoing.put(peer)
    house.outgoing.look_after()
    assert house.outgoing.next_back() is peer
    assert peer.journey is not None
    assert peer.journey.fate is Fate.TOO_LATE
    assert house.incoming.next() is None
    assert house.taken == []
    assert house.shared.connections() == 1
    assert client.hears() is None


def test_a_client_for_a_worker_that_had_the_slot_before_goes_back(
    house: House, client: Client
) -> None:
    peer = client.journey(house.shared)
    house.incoming._incarnation += 1
    house.outgoing.put(peer)
    assert house.incoming.next() is None
    house.outgoing.settle()
    assert house.outgoing.next_back() is peer
    assert house.shared.connections() == 1


@pytest.fixture
def crowd() -> Iterator[list[Client]]:
    clients = [Client(*socket.socketpair()) for _ in range(TICKETS + 50)]
    yield clients
    for each in clients:
        each.near.close()
        each.far.close()


def test_of_one_that_is_closed_while_it_is_put_in_nothing_gets_there(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another client's by then."""
    peer = client.journey(house.shared, b"x" * (MOST_INLINE + 1))

    def in_memory(data: bytes) -> int:
        assert house.outgoing.withdraw_all() == [peer]
        peer.close()
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(outgoing, "in_memory", in_memory)
    house.outgoing.put(peer)
    assert not select.select([house.incoming.descriptor], [], [], 0)[0]
    assert house.outgoing.count == 0


@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE])
def test_more_clients_than_there_is_room_for_are_put_in_when_there_is(
    house: House, crowd: list[Client], size: int
) -> None:
    for client in crowd:  # nobody waits here for the receiver
        house.outgoing.put(client.journey(house.shared, b" " * size))
    assert house.outgoing.count == len(crowd)
    for _ in crowd:
        house.outgoing.look_after()
        while (found := house.incoming.next()) is not None:
            serve(found)
            house.gates[RECEIVER].closed()
    house.outgoing.settle()
    assert len(house.taken) == len(crowd)
    assert house.outgoing.count == 0
    assert house.shared.connections() == 0
    assert [client.hears() for client in crowd] == [b"served"] * len(crowd)


def test_clients_that_there_is_no_room_for_come_back_as_those_on_their_way_do(
    house: House, crowd: list[Client]
) -> None:
    until = time.monotonic() + 0.3
    peers = [client.journey(house.shared, until=until) for client in crowd]
    for peer in peers:
        house.outgoing.put(peer)
    house.outgoing.look_after()
    assert house.outgoing.next_back() is None
    time.sleep(max(0.0, until - time.monotonic()))
    house.outgoing.look_after()
    back = [house.outgoing.next_back() for _ in peers]
    assert set(back) == set(peers)
    assert {peer.journey.fate for peer in peers if peer.journey} == {Fate.TOO_LATE}
    assert house.incoming.next() is None
    assert house.outgoing.count == 0


def test_a_receiver_killed_at_any_step_has_the_client_or_leaves_it_to_its_sender() -> None:
    step, outcomes = 0, set()
    killed = True
    while killed:
        house, pair = House(), socket.socketpair()
        client = Client(*pair)
        peer = client.journey(house.shared)
        house.outgoing.put(peer)
        incoming, gate = house.incoming, house.gates[RECEIVER]

        def receive(incoming: Incoming = incoming, gate: Gate = gate) -> None:
            serve(incoming.next())
            gate.closed()

        killed = kill_at(step, receive)
        house.dies(RECEIVER)
        house.outgoing.look_after()
        if house.taken:
            assert house.taken == [peer]
            assert house.outgoing.next_back() is None
            assert house.shared.connections() == 0
            assert client.hears() in (b"", b"served")
        else:
            assert house.outgoing.next_back() is peer
            assert house.shared.connections() == 1
            assert client.hears() is None
        outcomes.add(bool(house.taken))
        client.near.close()
        client.far.close()
        house.close()
        step += 1
    assert step > 20
    assert outcomes == {False, True}


def test_a_sender_killed_at_any_step_leaves_no_client_that_nobody_counts() -> None:
    step = 0
    outcomes: set[object] = set()
    killed = True
    while killed:
        house, pair = House(), socket.socketpair()
        client = Client(*pair)
        peer = client.journey(house.shared)
        killed = kill_at(step, partial(house.outgoing.put, peer))
        client.near.close()
        # The receiver may come before the master sees that the sender has ended, or after it.
        for receiver_first in (True, False):
            if not receiver_first:
                house.dies(SENDER)
            found = house.incoming.next()
            if found is not None:
                assert receiver_first
                outcomes.add("taken")
                serve(found)
                house.gates[RECEIVER].closed()
        assert house.shared.connections() == 0
        heard = client.hears()
        assert heard in (b"", b"served")
        outcomes.add(heard)
        client.far.close()
        house.close()
        step += 1
    assert step > 10
    assert outcomes == {"taken", b"", b"served"}


def test_the_main_thread_is_told_of_one_that_waits_though_it_has_just_looked(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    outgoing = house.outgoing

    def no_room(*_: object) -> bool:
        for _look in range(3):  # the thread was held up, and the main thread saw nobody yet
            delay = outgoing.look_after()
        assert delay == math.inf
        return False

    outgoing.look_after()
    monkeypatch.setattr(outgoing, "_offer", no_room)
    outgoing._watched = True
    outgoing.put(client.journey(house.shared))
    assert os.eventfd_read(house.bells[SENDER].watch) == 1
    assert outgoing.count == 1
    assert outgoing.look_after() < math.inf
