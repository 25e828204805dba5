"""A client on its way to another worker is always one side's, whichever process is killed when."""

import contextlib
import gc
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple
from unittest.mock import Mock

import pytest
from conftest import close_wakeups
from killing import kill_at
from running_out import no_descriptors

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.connection_table import ConnectionTableWriter
from cpanbridge.supervisor.memory.handoff_claims import CLAIMS
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.transfer import MovingClient, ReturnReason, Transfer
from cpanbridge.workers.handoff import incoming, outgoing
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.handoff.message import MOST_INLINE
from cpanbridge.workers.handoff.outgoing import Outgoing
from cpanbridge.workers.requests.calls import Call
from cpanbridge.workers.sessions.dispatch import Dispatcher

SENDER, RECEIVER = 0, 1
DATA = b'{"module": "m", "function": "f"}'


class Connection(NamedTuple):
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
        """The client as its sender has it, when it is about to be put into the queue."""
        shared.slots[SENDER].opened += 1
        shared.header.connections += 1
        client = ClientSocket(self.near.fileno(), 0, _socket=self.near)
        moving = MovingClient(self.near.fileno(), data, 123, 4, 5.5, 6, input_may_have_ended)
        client.transfer = Transfer(moving, shared.owner(RECEIVER), until, known=True)
        return client

    def hears(self) -> bytes | None:
        """What has come for the process that calls; None: nothing yet."""
        if not select.select([self.far], [], [], 0)[0]:
            return None
        return self.far.recv(100)


class TwoWorkers:
    """Two workers' memory and wake-ups, and clients."""

    def __init__(self) -> None:
        self.shared = Shared.create(2, Limits())
        self.wakeups = [Wakeups.create() for _ in self.shared.slots]
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in (SENDER, RECEIVER)]
        self.taken: list[ClientSocket] = []
        self.outgoing = Outgoing(self.shared, SENDER, self.wakeups, self._let_go)
        self.incoming = Incoming(self.shared, RECEIVER, self.wakeups, self.gates[RECEIVER])

    def _let_go(self, client: ClientSocket) -> None:
        self.taken.append(client)
        client.socket.close()
        self.gates[SENDER].release_connection()

    def close(self) -> None:
        """Leave nothing open."""
        for queue in (self.incoming._queue, *self.outgoing._queues.values()):
            queue.detach()
        close_wakeups(self.wakeups)
        os.close(self.outgoing.descriptor)
        os.close(self.shared.fd)

    def dies(self, slot: int) -> None:
        """What the master does when a worker has ended."""
        self.shared.clear(self.shared.slots[slot])
        handoff_sockets.discard_all(self.wakeups[slot].take)


@pytest.fixture
def workers() -> Iterator[TwoWorkers]:
    workers = TwoWorkers()
    yield workers
    workers.close()


@pytest.fixture
def remote() -> Iterator[Connection]:
    near, far = socket.socketpair()
    yield Connection(near, far)
    near.close()
    far.close()


def serve(found: tuple[MovingClient, int] | None) -> None:
    """What the receiver does with a client."""
    if found is not None:
        moving, _ = found
        with socket.socket(fileno=moving.descriptor) as remote:
            remote.sendall(b"served")
            remote.shutdown(socket.SHUT_RDWR)


def test_two_threads_that_hand_over_at_first_leave_the_queue_open(
    workers: TwoWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket object that goes closes its descriptor, and a client may get that number."""
    make, together = handoff_sockets.end_of, threading.Barrier(2)

    def slowly(descriptor: int) -> socket.socket:
        queue = make(descriptor)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)  # for the other thread, if it gets here too
        return queue

    monkeypatch.setattr(handoff_sockets, "end_of", slowly)
    with ThreadPoolExecutor(2) as pool:
        queues = list(pool.map(workers.outgoing._queue, [RECEIVER] * 2))
    assert queues[0] is queues[1]
    del queues
    gc.collect()
    os.fstat(workers.wakeups[RECEIVER].put)


@pytest.mark.parametrize("input_may_have_ended", [True, False])
@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE, MOST_INLINE + 1, 3_000_000])
def test_a_client_arrives_with_all_that_is_known_of_it(
    workers: TwoWorkers, remote: Connection, size: int, input_may_have_ended: bool
) -> None:
    data = os.urandom(size)
    client = remote.transfer(workers.shared, data, input_may_have_ended=input_may_have_ended)
    workers.outgoing.put(client)
    assert workers.outgoing.count == 1
    found = workers.incoming.next()
    assert found is not None
    moving, number = found
    assert moving[1:] == (data, 123, 4, 5.5, 6, input_may_have_ended)
    assert number == 1
    workers.outgoing.settle()
    assert workers.taken == [client]
    assert workers.outgoing.count == 0
    assert workers.shared.connections() == 1
    serve(found)
    assert remote.hears() == b"served"


def test_a_client_is_the_senders_again_when_it_is_withdrawn(
    workers: TwoWorkers, remote: Connection
) -> None:
    client = remote.transfer(workers.shared, until=time.monotonic() - 1)
    workers.outgoing.put(client)
    workers.outgoing.look_after()
    assert workers.outgoing.next_returned() is client
    assert client.transfer is not None
    assert client.transfer.return_reason is ReturnReason.TOO_LATE
    assert workers.incoming.next() is None
    assert workers.taken == []
    assert workers.shared.connections() == 1
    assert remote.hears() is None


def test_a_client_for_a_worker_that_had_the_slot_before_goes_back(
    workers: TwoWorkers, remote: Connection
) -> None:
    client = remote.transfer(workers.shared)
    workers.incoming._incarnation += 1
    workers.outgoing.put(client)
    assert workers.incoming.next() is None
    workers.outgoing.settle()
    assert workers.outgoing.next_returned() is client
    assert workers.shared.connections() == 1


@pytest.fixture
def crowd() -> Iterator[list[Connection]]:
    remotes = [Connection(*socket.socketpair()) for _ in range(CLAIMS + 50)]
    yield remotes
    for each in remotes:
        each.near.close()
        each.far.close()


def test_of_one_that_is_closed_while_it_is_put_in_nothing_gets_there(
    workers: TwoWorkers, remote: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another client's by then."""
    client = remote.transfer(workers.shared, b"x" * (MOST_INLINE + 1))

    def in_memory(data: bytes) -> int:
        assert workers.outgoing.withdraw_all() == [client]
        client.close()
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(outgoing, "in_memory", in_memory)
    workers.outgoing.put(client)
    assert not select.select([workers.incoming.descriptor], [], [], 0)[0]
    assert workers.outgoing.count == 0


@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE])
def test_more_clients_than_there_is_room_for_are_put_in_when_there_is(
    workers: TwoWorkers, crowd: list[Connection], size: int
) -> None:
    for remote in crowd:  # nobody waits here for the receiver
        workers.outgoing.put(remote.transfer(workers.shared, b" " * size))
    assert workers.outgoing.count == len(crowd)
    for _ in crowd:
        workers.outgoing.look_after()
        while (found := workers.incoming.next()) is not None:
            serve(found)
            workers.gates[RECEIVER].release_connection()
    workers.outgoing.settle()
    assert len(workers.taken) == len(crowd)
    assert workers.outgoing.count == 0
    assert workers.shared.connections() == 0
    assert [remote.hears() for remote in crowd] == [b"served"] * len(crowd)


def test_clients_that_there_is_no_room_for_come_back_as_those_on_their_way_do(
    workers: TwoWorkers, crowd: list[Connection]
) -> None:
    until = time.monotonic() + 0.3
    clients = [remote.transfer(workers.shared, until=until) for remote in crowd]
    for client in clients:
        workers.outgoing.put(client)
    workers.outgoing.look_after()
    assert workers.outgoing.next_returned() is None
    time.sleep(max(0.0, until - time.monotonic()))
    workers.outgoing.look_after()
    back = [workers.outgoing.next_returned() for _ in clients]
    assert set(back) == set(clients)
    assert {client.transfer.return_reason for client in clients if client.transfer} == {
        ReturnReason.TOO_LATE
    }
    assert workers.incoming.next() is None
    assert workers.outgoing.count == 0


def test_a_receiver_killed_at_any_step_has_the_client_or_leaves_it_to_its_sender() -> None:
    step, outcomes = 0, set()
    killed = True
    while killed:
        workers, pair = TwoWorkers(), socket.socketpair()
        remote = Connection(*pair)
        client = remote.transfer(workers.shared)
        workers.outgoing.put(client)
        incoming, gate = workers.incoming, workers.gates[RECEIVER]

        def receive(incoming: Incoming = incoming, gate: Gate = gate) -> None:
            serve(incoming.next())
            gate.release_connection()

        killed = kill_at(step, receive)
        workers.dies(RECEIVER)
        workers.outgoing.look_after()
        if workers.taken:
            assert workers.taken == [client]
            assert workers.outgoing.next_returned() is None
            assert workers.shared.connections() == 0
            assert remote.hears() in (b"", b"served")
        else:
            assert workers.outgoing.next_returned() is client
            assert workers.shared.connections() == 1
            assert remote.hears() is None
        outcomes.add(bool(workers.taken))
        remote.near.close()
        remote.far.close()
        workers.close()
        step += 1
    assert step > 20
    assert outcomes == {False, True}


def test_a_sender_killed_at_any_step_leaves_no_client_that_nobody_counts() -> None:
    step = 0
    outcomes: set[object] = set()
    killed = True
    while killed:
        workers, pair = TwoWorkers(), socket.socketpair()
        remote = Connection(*pair)
        client = remote.transfer(workers.shared)
        killed = kill_at(step, partial(workers.outgoing.put, client))
        remote.near.close()
        # The receiver may come before the master sees that the sender has ended, or after it.
        for receiver_first in (True, False):
            if not receiver_first:
                workers.dies(SENDER)
            found = workers.incoming.next()
            if found is not None:
                assert receiver_first
                outcomes.add("taken")
                serve(found)
                workers.gates[RECEIVER].release_connection()
        assert workers.shared.connections() == 0
        heard = remote.hears()
        assert heard in (b"", b"served")
        outcomes.add(heard)
        remote.far.close()
        workers.close()
        step += 1
    assert step > 10
    assert outcomes == {"taken", b"", b"served"}


def test_the_main_thread_is_told_of_one_that_waits_though_it_has_just_looked(
    workers: TwoWorkers, remote: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    outgoing = workers.outgoing

    def no_room(*_: object) -> bool:
        for _look in range(3):  # the thread was held up, and the main thread saw nobody yet
            delay = outgoing.look_after()
        assert delay == math.inf
        return False

    outgoing.look_after()
    monkeypatch.setattr(outgoing, "_offer", no_room)
    outgoing._watched = True
    outgoing.put(remote.transfer(workers.shared))
    assert os.eventfd_read(workers.wakeups[SENDER].main) == 1
    assert outgoing.count == 1
    assert outgoing.look_after() < math.inf


@pytest.mark.parametrize("size", [len(DATA), MOST_INLINE + 1])
@pytest.mark.parametrize("left", range(4))
def test_a_client_that_is_not_received_for_want_of_descriptors_is_returned(
    workers: TwoWorkers, remote: Connection, size: int, left: int
) -> None:
    client = remote.transfer(workers.shared, data=bytes(size))
    workers.outgoing.put(client)
    with no_descriptors(left):
        if left >= (2 if size > MOST_INLINE else 1):
            serve(workers.incoming.next())
            assert remote.hears() == b"served"
            return
        with pytest.raises(OSError, match="Too many open files"):
            workers.incoming.next()
    workers.outgoing.settle()
    assert workers.outgoing.next_returned() is client


def test_a_client_whose_message_cannot_be_unpacked_is_returned(
    workers: TwoWorkers, remote: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(descriptor: int) -> bytes:
        raise MemoryError(descriptor)

    client = remote.transfer(workers.shared, data=bytes(MOST_INLINE + 1))
    workers.outgoing.put(client)
    monkeypatch.setattr(incoming, "from_memory", no_memory)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MemoryError):
        workers.incoming.next()
    assert os.listdir("/proc/self/fd") == before
    workers.outgoing.settle()
    assert workers.outgoing.next_returned() is client


def test_a_client_that_cannot_be_sent_is_not_on_its_way(
    workers: TwoWorkers, remote: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(data: bytes) -> int:
        raise MemoryError(data)

    monkeypatch.setattr(outgoing, "in_memory", no_memory)
    with pytest.raises(MemoryError):
        workers.outgoing.put(remote.transfer(workers.shared, data=bytes(MOST_INLINE + 1)))
    assert workers.outgoing.count == 0


def test_a_sender_whose_client_is_returned_takes_nothing_out_of_a_queue(
    workers: TwoWorkers, remote: Connection, crowd: list[Connection]
) -> None:
    """The slot of the worker that has ended may have the next one, with a client in its queue."""
    table = ConnectionTableWriter(workers.shared.statistics[SENDER].connection_table)
    dispatcher = Dispatcher(workers.shared, workers.outgoing, table)
    transfer = remote.transfer(workers.shared).transfer
    assert transfer is not None
    transfer.may_stay = True
    workers.dies(RECEIVER)
    workers.outgoing.put(crowd[0].transfer(workers.shared))
    dispatcher.accept_returned(Mock(spec=Call), transfer, stop=-1)
    next_worker = Incoming(workers.shared, RECEIVER, workers.wakeups, workers.gates[RECEIVER])
    serve(next_worker.next())
    next_worker._queue.detach()
    assert crowd[0].hears() == b"served"


def test_two_clients_that_are_returned_while_the_descriptor_is_read_are_both_found(
    workers: TwoWorkers, crowd: list[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [remote.transfer(workers.shared) for remote in crowd[:2]]

    def return_both_before(descriptor: int) -> int:
        monkeypatch.undo()
        for client in clients:
            workers.outgoing.return_client(client)
        return os.eventfd_read(descriptor)

    monkeypatch.setattr(os, "eventfd_read", return_both_before)
    assert workers.outgoing.next_returned() is clients[0]
    assert select.select([workers.outgoing.descriptor], [], [], 0)[0]
    assert workers.outgoing.next_returned() is clients[1]
