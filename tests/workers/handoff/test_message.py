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

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate, Wakeups
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.handoff_claims import CLAIMS
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.transfer import Fate, MovingClient, Transfer
from cpanbridge.workers.handoff import outgoing
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.handoff.message import MOST_INLINE
from cpanbridge.workers.handoff.outgoing import Outgoing

SENDER, RECEIVER = 0, 1
DATA = b'{"module": "m", "function": "f"}'


class ClientProcess(NamedTuple):
    """A connection: the worker's end, and the end of the process that calls."""

    near: socket.socket
    far: socket.socket

    def transfer(
        self,
        shared: Shared,
        data: bytes = DATA,
        until: float = math.inf,
        input_may_have_ended: bool = True,
    ) -> ClientSocket:
        """The client as its sender has it, when it is about to be put into the postbox."""
        shared.slots[SENDER].opened += 1
        client = ClientSocket(self.near.fileno(), 0, _socket=self.near)
        moving = MovingClient(self.near.fileno(), data, 123, 4, 5.5, input_may_have_ended)
        client.transfer = Transfer(moving, shared.owner(RECEIVER), until, known=True)
        return client

    def hears(self) -> bytes | None:
        """What has come for the process that calls; None: nothing yet."""
        if not select.select([self.far], [], [], 0)[0]:
            return None
        return self.far.recv(100)


class House:
    """Two workers' memory and bells, and clients."""

    def __init__(self) -> None:
        self.shared = Shared.create(2, Limits())
        self.wakeups = [Wakeups.hang() for _ in self.shared.slots]
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in (SENDER, RECEIVER)]
        self.taken: list[ClientSocket] = []
        self.outgoing = Outgoing(self.shared, SENDER, self.wakeups, self._let_go)
        self.incoming = Incoming(self.shared, RECEIVER, self.wakeups, self.gates[RECEIVER])

    def _let_go(self, client: ClientSocket) -> None:
        self.taken.append(client)
        client.socket.close()
        self.gates[SENDER].closed()

    def close(self) -> None:
        """Leave nothing open."""
        for queue in (self.incoming._queue, *self.outgoing._queues.values()):
            queue.detach()
        take_down(self.wakeups)
        os.close(self.outgoing.descriptor)
        os.close(self.shared.fd)

    def dies(self, slot: int) -> None:
        """What the master does when a worker has ended."""
        self.shared.clear(self.shared.slots[slot])
        handoff_sockets.throw_away(self.wakeups[slot].take)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


@pytest.fixture
def remote() -> Iterator[ClientProcess]:
    near, far = socket.socketpair()
    yield ClientProcess(near, far)
    near.close()
    far.close()


def serve(found: tuple[MovingClient, int] | None) -> None:
    """What the receiver does with a client."""
    if found is not None:
        moving, _ = found
        with socket.socket(fileno=moving.descriptor) as remote:
            remote.sendall(b"served")
            remote.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("may_be_dismissed", [True, False])
@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE, MOST_INLINE + 1, 3_000_000])
def test_a_client_arrives_with_all_that_is_known_of_it(
    house: House, remote: ClientProcess, size: int, input_may_have_ended: bool
) -> None:
    data = os.urandom(size)
    client = remote.transfer(house.shared, data, input_may_have_ended=input_may_have_ended)
    house.outgoing.put(client)
    assert house.outgoing.count == 1
    found = house.incoming.next()
    assert found is not None
    moving, number = found
    assert moving[1:] == (data, 123, 4, 5.5, input_may_have_ended)
    assert number == 1
    house.outgoing.settle()
    assert house.taken == [client]
    assert house.outgoing.count == 0
    assert house.shared.connections() == 1
    serve(found)
    assert remote.hears() == b"served"


def test_a_client_is_the_senders_again_when_it_is_withdrawn(
    house: House, remote: ClientProcess
) -> None:
    client = remote.transfer(house.shared, until=time.monotonic() - 1)
    house.outgoing.put(client)
    house.outgoing.look_after()
    assert house.outgoing.next_back() is client
    assert client.transfer is not None
    assert client.transfer.fate is Fate.TOO_LATE
    assert house.incoming.next() is None
    assert house.taken == []
    assert house.shared.connections() == 1
    assert remote.hears() is None


def test_a_client_for_a_worker_that_had_the_slot_before_goes_back(
    house: House, remote: ClientProcess
) -> None:
    client = remote.transfer(house.shared)
    house.incoming._incarnation += 1
    house.outgoing.put(client)
    assert house.incoming.next() is None
    house.outgoing.settle()
    assert house.outgoing.next_back() is client
    assert house.shared.connections() == 1


@pytest.fixture
def crowd() -> Iterator[list[ClientProcess]]:
    remotes = [ClientProcess(*socket.socketpair()) for _ in range(CLAIMS + 50)]
    yield remotes
    for each in remotes:
        each.near.close()
        each.far.close()


def test_of_one_that_is_closed_while_it_is_put_in_nothing_gets_there(
    house: House, remote: ClientProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another client's by then."""
    client = remote.transfer(house.shared, b"x" * (MOST_INLINE + 1))

    def in_memory(data: bytes) -> int:
        assert house.outgoing.withdraw_all() == [client]
        client.close()
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(outgoing, "in_memory", in_memory)
    house.outgoing.put(client)
    assert not select.select([house.incoming.descriptor], [], [], 0)[0]
    assert house.outgoing.count == 0


@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE])
def test_more_clients_than_there_is_room_for_are_put_in_when_there_is(
    house: House, crowd: list[ClientProcess], size: int
) -> None:
    for remote in crowd:  # nobody waits here for the receiver
        house.outgoing.put(remote.transfer(house.shared, b" " * size))
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
    assert [remote.hears() for remote in crowd] == [b"served"] * len(crowd)


def test_clients_that_there_is_no_room_for_come_back_as_those_on_their_way_do(
    house: House, crowd: list[ClientProcess]
) -> None:
    until = time.monotonic() + 0.3
    clients = [remote.transfer(house.shared, until=until) for remote in crowd]
    for client in clients:
        house.outgoing.put(client)
    house.outgoing.look_after()
    assert house.outgoing.next_back() is None
    time.sleep(max(0.0, until - time.monotonic()))
    house.outgoing.look_after()
    back = [house.outgoing.next_back() for _ in clients]
    assert set(back) == set(clients)
    assert {client.transfer.fate for client in clients if client.transfer} == {Fate.TOO_LATE}
    assert house.incoming.next() is None
    assert house.outgoing.count == 0


def test_a_receiver_killed_at_any_step_has_the_client_or_leaves_it_to_its_sender() -> None:
    step, outcomes = 0, set()
    killed = True
    while killed:
        house, pair = House(), socket.socketpair()
        remote = ClientProcess(*pair)
        client = remote.transfer(house.shared)
        house.outgoing.put(client)
        incoming, gate = house.incoming, house.gates[RECEIVER]

        def receive(incoming: Incoming = incoming, gate: Gate = gate) -> None:
            serve(incoming.next())
            gate.closed()

        killed = kill_at(step, receive)
        house.dies(RECEIVER)
        house.outgoing.look_after()
        if house.taken:
            assert house.taken == [client]
            assert house.outgoing.next_back() is None
            assert house.shared.connections() == 0
            assert remote.hears() in (b"", b"served")
        else:
            assert house.outgoing.next_back() is client
            assert house.shared.connections() == 1
            assert remote.hears() is None
        outcomes.add(bool(house.taken))
        remote.near.close()
        remote.far.close()
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
        remote = ClientProcess(*pair)
        client = remote.transfer(house.shared)
        killed = kill_at(step, partial(house.outgoing.put, client))
        remote.near.close()
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
        heard = remote.hears()
        assert heard in (b"", b"served")
        outcomes.add(heard)
        remote.far.close()
        house.close()
        step += 1
    assert step > 10
    assert outcomes == {"taken", b"", b"served"}


def test_the_main_thread_is_told_of_one_that_waits_though_it_has_just_looked(
    house: House, remote: ClientProcess, monkeypatch: pytest.MonkeyPatch
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
    outgoing.put(remote.transfer(house.shared))
    assert os.eventfd_read(house.wakeups[SENDER].watch) == 1
    assert outgoing.count == 1
    assert outgoing.look_after() < math.inf
