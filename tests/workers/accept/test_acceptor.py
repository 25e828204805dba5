"""The leading thread finds every client, and wakes others for those that it cannot accept."""

import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import close_wakeups
from plain_client import until
from running_out import no_descriptors

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.fields import ADMITTED, WAITS_FOR_REQUEST
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.listener_box import ListenerBox
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.workers.accept import acceptor, listen_queue
from cpanbridge.workers.accept.acceptor import MOST_IN_A_ROW, Acceptor
from cpanbridge.workers.accept.admission import Admission, WaitingRequest
from cpanbridge.workers.accept.listen_queue import TIMES_IN_A_ROW, ListenQueue
from cpanbridge.workers.accept.listeners import Listeners
from cpanbridge.workers.accept.ready_clients import ReadyClients
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.spare_descriptors import SpareDescriptors


class Worker:
    """One worker's acceptor, its gate, and the wake-ups of this worker and of another one."""

    def __init__(
        self, listeners: Sequence[socket.socket] = (), rejecter: Any = None, **limits: Any
    ) -> None:
        self.wakeups = [Wakeups.create(), Wakeups.create()]
        self.keep_alive = KeepAlive()
        self.may_be_held_up = False
        self.shared = Shared.create(2, Limits(**limits))
        self.gate = Gate(self.shared, 0, self.wakeups)
        self.outgoing = self.no_clients()
        self.admission: Admission[None] = Admission(
            self.gate, self.wakeups[0].room, lambda *_: None, lambda: False
        )
        self.ready: ReadyClients[None] = ReadyClients(
            self.no_clients(),
            self.outgoing,
            self.keep_alive,
            self.admission,
            lambda *_: None,
        )
        inherited = Listeners(listeners, ListenerBox(-1, -1), self.shared)
        self.queue = ListenQueue(inherited, self.ready.epoll, self.shared, 0, self.gate)
        self.acceptor: Acceptor[None] = Acceptor(
            self.queue,
            self.ready,
            self.gate,
            lambda *_: None,
            lambda: self.may_be_held_up,
            rejecter,
        )
        self.thread: threading.Thread | None = None
        self.arrivals: list[Any] = []

    def no_clients(self) -> Any:
        """A source of hand-offs that has none."""
        return SimpleNamespace(
            descriptor=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
            waiting=False,
            settle=lambda most=None: None,
            on_their_way=0,
            claimed=0,
        )

    def lead(self) -> None:
        """Have a thread look for one client."""
        self.thread = threading.Thread(
            target=lambda: self.arrivals.append(self.acceptor.next()), daemon=True
        )
        self.thread.start()

    def sleeps(self) -> bool:
        """Whether that thread waits for a client."""
        assert self.thread is not None
        function = Path(f"/proc/self/task/{self.thread.native_id}/wchan").read_text()
        return function in ("do_epoll_wait", "ep_poll")

    def other_was_woken(self) -> bool:
        """Whether the other worker's main thread was woken since the last check."""
        wakeup = self.wakeups[1].main
        if not select.select([wakeup], [], [], 0)[0]:
            return False
        return os.eventfd_read(wakeup) > 0

    def next_of_kind(self) -> str:
        """Find the next client, and close it: which side it came from."""
        arrival = self.acceptor.next()
        assert arrival is not None
        if arrival.client is None:
            os.close(arrival.descriptor)
            self.gate.release_connection()
            return "accepted"
        return "kept"

    def close(self) -> None:
        self.acceptor.close()
        if self.thread is not None:
            self.thread.join(20)
            assert not self.thread.is_alive()
        for arrival in self.arrivals:
            if arrival is not None:
                os.close(arrival.descriptor)
        close_wakeups(self.wakeups)


NewWorker = Callable[..., Worker]


@pytest.fixture
def new_worker(listener: socket.socket) -> Iterator[NewWorker]:
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any, **limits: Any) -> Worker:
            worker = Worker(*(arguments or ([listener],)), **limits)
            stack.callback(worker.close)
            return worker

        yield make


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with listening(tmp_path / "s") as made:
        yield made


def listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    made.setblocking(False)
    return made


def connect(listener: socket.socket) -> socket.socket:
    """A client that waits in the listen queue."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    return client


def kept_client(worker: Worker) -> tuple[ClientSocket, socket.socket]:
    """A connection that rests, and the client's end of it."""
    ours, theirs = socket.socketpair()
    client = ClientSocket(ours.detach(), 0)
    worker.keep_alive.add(client)
    return client, theirs


# -- which workers are woken --


def test_of_idle_workers_one_is_woken_for_a_client_and_of_busy_ones_all(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    workers = [new_worker() for _ in range(6)]
    busy = set(workers[:2])
    woken: set[Worker] = set()

    def accept(worker: Worker) -> None:
        woken.add(worker)
        until(lambda: worker.acceptor._is_closed)

    for worker in workers:
        worker.may_be_held_up = worker in busy
        worker.lead()
    until(lambda: all(worker.sleeps() for worker in workers))
    for worker in workers:
        worker.acceptor._accept_when_room = lambda worker=worker: accept(worker)  # type: ignore
    with connect(listener):
        until(lambda: len(woken) >= 3)
        assert busy < woken
        assert sum(worker.sleeps() for worker in workers) == 3
        for worker in workers:
            worker.acceptor.close()


def lead_deaf(worker: Worker) -> None:
    """Have a thread lead that the kernel does not wake for a client: it wakes another worker."""
    worker.queue._exclusive = select.epoll()
    worker.queue._exclusive.register(worker.ready.epoll, select.EPOLLIN)
    worker.lead()
    until(worker.sleeps)


@pytest.mark.parametrize("is_shut", [False, True])
def test_a_client_for_whom_only_another_worker_was_woken_is_found(
    new_worker: NewWorker, listener: socket.socket, is_shut: bool
) -> None:
    worker = new_worker()
    lead_deaf(worker)
    worker.acceptor.check_listen_queue()
    until(worker.sleeps)
    assert not worker.arrivals
    with connect(listener):
        if is_shut:
            worker.acceptor.shut()
            until(lambda: worker.acceptor.is_shut)
        worker.acceptor.check_listen_queue()
        if not is_shut:
            until(lambda: worker.arrivals)
        worker.acceptor.close()
        until(lambda: worker.arrivals)
    assert (worker.arrivals == [None]) is is_shut


@pytest.mark.parametrize("why", ["no room", "held back"])
def test_a_worker_that_was_woken_and_whose_threads_all_serve_wakes_the_others(
    new_worker: NewWorker, listener: socket.socket, why: str
) -> None:
    worker = new_worker([listener], max_connections=1)
    client, theirs = kept_client(worker)
    with theirs, contextlib.ExitStack() as stack:
        wait = worker.queue.wait

        def both_come(seconds: float | None, *, exclusive: bool) -> bool:
            stack.enter_context(connect(listener))
            if why == "no room":
                assert worker.gate.take_connection()
            else:
                worker.outgoing.on_their_way = 2
            woken = wait(seconds, exclusive=exclusive)
            theirs.send(b"x")
            return woken

        worker.queue.wait = both_come  # type: ignore[method-assign]
        assert worker.next_of_kind() == "kept"
        assert not worker.other_was_woken()
        worker.acceptor.leave_to_others()
        assert worker.other_was_woken()
        worker.acceptor.leave_to_others()
        assert not worker.other_was_woken()  # once for each time that it was woken
    client.close()


def test_a_lone_client_is_left_to_the_worker_that_is_awake(
    new_worker: NewWorker, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen_queue, "AWAY_SECONDS", 0.05)
    worker = new_worker()
    header, other = worker.shared.header, worker.shared.slots[1]
    other.serves = 1

    def seconds_to_accept() -> float:
        header.awake_acceptor = 2
        with connect(listener):
            began = time.monotonic()
            assert worker.next_of_kind() == "accepted"
        return time.monotonic() - began

    worker.queue._times_not_needed = TIMES_IN_A_ROW
    worker.acceptor._accepts_first = False
    worker.queue.accept = none_at_first(worker.queue.accept)  # type: ignore[method-assign]
    assert seconds_to_accept() >= 0.05
    monkeypatch.setattr(listen_queue, "AWAY_SECONDS", 40.0)
    worker.queue.accept = none_at_first(worker.queue.accept)  # type: ignore[method-assign]
    assert seconds_to_accept() < 20  # no second one, before that worker has accepted the first
    other.accepted += 1
    other.admitted += 1
    worker.queue.accept = none_at_first(worker.queue.accept)  # type: ignore[method-assign]
    assert seconds_to_accept() < 20  # it runs a call


def none_at_first(accept: Callable[[], int | None]) -> Callable[[], int | None]:
    """As for a client that connects just after the first try, when the worker begins to wait."""
    tries = iter([None])

    def later() -> int | None:
        try:
            return next(tries)
        except StopIteration:
            return accept()

    return later


def test_a_client_that_cannot_be_accepted_for_want_of_descriptors_is_left_to_others(
    new_worker: NewWorker, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    tries = 0

    def accept(_: int) -> int:
        nonlocal tries
        tries += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(syscalls, "accept", accept)
    worker.lead()
    until(lambda: tries > 1)
    assert not worker.other_was_woken()  # no client is there
    with connect(listener):
        until(worker.other_was_woken)
        before = tries
        until(lambda: tries > before + 2)
        assert not worker.other_was_woken()  # not all the time
        worker.acceptor.close()
        until(lambda: worker.arrivals)
    assert worker.gate._shared.connections() == 0


def test_no_client_is_accepted_with_the_last_descriptors(
    new_worker: NewWorker, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, spare = new_worker(), SpareDescriptors()
    monkeypatch.setattr(listen_queue, "spare", spare)
    spare.begin()
    with connect(listener):
        with no_descriptors():
            used = [spare.open(lambda: os.dup(0)) for _ in range(2)]
            os.close(used.pop())  # is kept for what must not fail
            with pytest.raises(OSError, match="Too many open files"):
                worker.queue.accept()
            os.close(used.pop())
            with pytest.raises(OSError, match="Too many open files"):
                worker.queue.accept()
        accepted = worker.queue.accept()
        assert accepted is not None
        os.close(accepted)
    spare.let_go()


def test_room_is_given_back_whatever_keeps_a_client_from_being_accepted(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> int:
        raise ValueError("a fault of the daemon's own")

    worker = new_worker()
    monkeypatch.setattr(worker.queue, "accept", fails)
    with pytest.raises(ValueError, match="a fault"):
        worker.acceptor.next()
    assert worker.shared.connections() == worker.shared.header.connections == 0


# -- in turn --


def test_clients_of_all_listeners_are_accepted_in_turn(
    new_worker: NewWorker, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listening(tmp_path / name)) for name in ("a", "b")]
        for _ in range(2):
            for listener in listeners:
                stack.enter_context(connect(listener))
        worker = new_worker(listeners)
        names = []
        for _ in range(4):
            arrival = worker.acceptor.next()
            assert arrival is not None
            with socket.socket(fileno=arrival.descriptor) as client:
                names.append(Path(client.getsockname()).name)
    assert names == ["a", "b", "a", "b"]


def test_neither_side_keeps_the_other_waiting(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    """New clients and those that have kept their connections, both without a pause."""
    worker = new_worker()
    kept = [kept_client(worker) for _ in range(3 * MOST_IN_A_ROW)]
    with contextlib.ExitStack() as stack:
        for _ in range(3 * MOST_IN_A_ROW):
            stack.enter_context(connect(listener))
        for _, theirs in kept:
            stack.enter_context(theirs)
            theirs.send(b"x")
        kinds = [worker.next_of_kind() for _ in range(6 * MOST_IN_A_ROW)]
    turns = [kinds[at : at + MOST_IN_A_ROW] for at in range(0, len(kinds), MOST_IN_A_ROW)]
    assert [set(turn) for turn in turns] == [{"accepted"}, {"kept"}] * 3
    for client, _ in kept:
        client.close()


def test_requests_that_have_waited_keep_no_kept_client_waiting(new_worker: NewWorker) -> None:
    worker = new_worker()
    kept, theirs = kept_client(worker)
    theirs.sendall(b"x")
    waiting, other_ends = zip(*(socket.socketpair() for _ in range(4)), strict=True)
    for ours in waiting:
        client = ClientSocket(ours.fileno(), 0)
        request = WaitingRequest[None](client, b"x", None, None, 0, 0.0, math.inf, is_movable=True)
        worker.admission.add(request, WAITS_FOR_REQUEST)
    served = []
    for _ in range(5):
        arrival = worker.ready.next()
        assert arrival is not None
        if arrival.ticket:
            assert worker.admission.admit(arrival.ticket) == ADMITTED
        served.append(arrival.client)
    assert kept in served[:2]
    assert [each.descriptor for each in served if each not in (kept, None)] == [
        ours.fileno() for ours in waiting
    ]
    for each in (*waiting, *other_ends, theirs):
        each.close()
    os.close(kept.descriptor)


def test_a_thread_that_is_free_again_has_the_next_client_at_once(
    new_worker: NewWorker, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "CROWDED_SECONDS", 3600.0)
    worker = new_worker()
    worker.gate.threads = 1
    assert worker.gate.admit() == ADMITTED
    worker.lead()
    until(worker.sleeps)
    worker.gate.release_request(True)
    with connect(listener):
        until(lambda: worker.arrivals)


def test_room_that_comes_while_a_request_finds_none_is_not_missed(new_worker: NewWorker) -> None:
    worker = new_worker()
    ours, theirs = socket.socketpair()
    client = ClientSocket(ours.fileno(), 0)
    request = WaitingRequest[None](client, b"x", None, None, 0, 0.0, math.inf, is_movable=True)
    worker.admission.add(request, WAITS_FOR_REQUEST)
    assert worker.admission.next() is request
    leader = threading.Thread(target=worker.admission.try_now)

    def admit(*_: int) -> int:
        leader.start()  # just after the look for room
        leader.join(0.1)
        return WAITS_FOR_REQUEST

    worker.gate.admit = admit  # type: ignore[method-assign,assignment]
    assert worker.admission.admit(request.ticket) == WAITS_FOR_REQUEST
    leader.join()
    worker.admission.add(request, WAITS_FOR_REQUEST)
    assert worker.admission.seconds() == 0.0
    for each in (ours, theirs):
        each.close()


def test_a_client_is_found_although_others_are_on_their_way_to_their_owners(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    worker = new_worker()
    worker.outgoing.on_their_way = 2
    held: list[float | None] = []
    wait = worker.ready.wait
    worker.ready.wait = lambda seconds=None: (held.append(seconds), wait(seconds))[1]  # type: ignore
    with connect(listener), connect(listener):
        assert [worker.next_of_kind() for _ in range(2)] == ["accepted"] * 2
    assert len(held) == 1  # once, for the owner to accept it: it does not claim any
    worker.outgoing.claimed += 1
    with connect(listener):
        assert worker.next_of_kind() == "accepted"
    assert len(held) == 2
    worker.outgoing.claimed += 1
    worker.outgoing.on_their_way = 1
    with connect(listener):
        assert worker.next_of_kind() == "accepted"
    assert len(held) == 2


# -- rejecting --


class Rejecter:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.has_place = True

    def can_take(self) -> bool:
        return self.has_place

    def take(self, client: Any) -> None:
        self.taken.append(client)


def test_a_client_without_room_goes_to_the_rejecter_and_takes_none(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    rejecter = Rejecter()
    worker = new_worker([listener], rejecter, max_connections=1)
    with connect(listener), connect(listener):
        first = worker.acceptor.next()
        assert first is not None
        worker.lead()
        until(lambda: rejecter.taken)
        (client,) = rejecter.taken
        client.close()
        assert worker.shared.connections() == 1
        os.close(first.descriptor)
        worker.gate.release_connection()
        with connect(listener):
            until(lambda: worker.arrivals)
    assert len(rejecter.taken) == 1


def test_a_client_with_room_is_accepted_though_the_rejecter_takes_no_more(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    rejecter = Rejecter()
    rejecter.has_place = False
    worker = new_worker([listener], rejecter, max_connections=1)
    with connect(listener):
        worker.lead()
        until(lambda: worker.arrivals)
    assert not rejecter.taken


def test_a_client_that_connects_just_before_room_is_given_back_is_not_rejected(
    new_worker: NewWorker, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejecter = Rejecter()
    worker = new_worker([listener], rejecter, max_connections=1)
    assert worker.gate.take_connection()
    take, tries = worker.gate.take_connection, []

    def give_back_after_two() -> bool:
        tries.append(take())
        if len(tries) == 2:
            worker.gate.release_connection()
        return tries[-1]

    monkeypatch.setattr(worker.gate, "take_connection", give_back_after_two)
    with connect(listener):
        assert worker.next_of_kind() == "accepted"
    assert len(tries) == 3
    assert not rejecter.taken


# -- the end --


def test_a_thread_that_waits_for_room_sees_that_it_is_to_shut(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    worker = new_worker([listener], max_connections=1)
    assert worker.gate.take_connection()
    worker.lead()
    until(lambda: worker.shared.counters.waiting.value == 1)
    worker.acceptor.shut()
    until(lambda: worker.acceptor.is_shut)
    worker.acceptor.close()
    until(lambda: worker.arrivals)
    assert worker.arrivals == [None]


def test_clients_that_are_left_are_given_out_for_an_answer(
    new_worker: NewWorker, listener: socket.socket
) -> None:
    worker = new_worker()
    with connect(listener):
        arrival = worker.acceptor.take_leftover(until=float("inf"))
        assert arrival is not None
        os.close(arrival.descriptor)
        assert worker.acceptor.take_leftover(until=float("inf")) is None
    assert worker.shared.connections() == 1  # the first one's
