"""A connection's life: read, admit, call, reply, release.

A one-shot client sends one request and is answered and closed; a framed one keeps its connection
for many. Which it is, the first byte tells. One thread at a time serves a connection, in blocking
code: a one-shot client's from its arrival to its close, a framed client's for as long as it has
requests. Then it rests (keepalive.py), and no thread waits for it.

The rules for a peer that is slow or gone: a request must be complete in time, see reading.py; a
reply must find a reader that takes some of it every `read_timeout`; a framed connection may rest
for `idle_timeout`. Room for a request is given back before the reply is sent, so a slow reader
holds nothing but its own connection.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.connection_table import IDLE
from cpanbridge.workers.accept.acceptor import Arrival
from cpanbridge.workers.accept.balance import TAKE_SECONDS, Balance
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import ConnectionDrainer, Draining
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.reader import Reader
from cpanbridge.workers.handoff.message import MOST_INLINE
from cpanbridge.workers.protocol import messages
from cpanbridge.workers.protocol.messages import NO_MORE_REQUESTS, Refusal
from cpanbridge.workers.requests.calls import Call, Calls
from cpanbridge.workers.sessions.affinity import Affinity, HandedOver
from cpanbridge.workers.sessions.sessions import run_in

LOGGER = logging.getLogger("cpanbridge.worker")

LINGER_SECONDS = 2.0
LEFTOVER_SECONDS = 0.2


class Stops(NamedTuple):
    """Descriptors that become readable when a worker leaves."""

    acceptor: int  # nobody is let in any more, and a kept connection takes up no further request
    all: int  # no request is taken up any more


class Connections:
    """What all connections of a worker need, and the life of each. Called from its threads.

    `dismissal` sends them away, `keep_alive` has those at rest, `balance` spreads those that are
    kept over the workers. `step_aside` is called before a thread waits for something, and
    `let_others_come_first` when a connection has come to stay.
    """

    def __init__(
        self,
        limits: Limits,
        gate: Gate,
        calls: Calls,
        affinity: Affinity,
        drainer: ConnectionDrainer,
        keep_alive: KeepAlive,
        balance: Balance,
        stops: Stops,
        step_aside: Callable[[], None],
        let_others_come_first: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._gate = gate
        self._calls = calls
        self._affinity = affinity
        self._drainer = drainer
        self._keep_alive = keep_alive
        self._balance = balance
        self._stops = stops
        self._step_aside = step_aside
        self._let_others_come_first = let_others_come_first
        self._connection_table = calls.connection_table
        self._reader = Reader(limits, calls.connection_table, step_aside)

    def is_quick(self, arrival: Arrival[Call]) -> bool:
        """Whether a client is likely to be served before another thread could be woken."""
        client = arrival.client
        if arrival.call is None:
            return client is not None and not arrival.data  # a kept one has ended
        if client is not None and client.transfer is not None:
            return False  # its owner may not be there any more: that takes a while to see to
        target = arrival.call.target
        # Putting a client into another worker's postbox is quick, whatever the call takes there; if
        # it is to run here after all, `_run` sees to that.
        return target.is_quick or target.owned_as is not None

    def serve(self, arrival: Arrival[Call]) -> None:
        """Serve a client that was let in, or one that has sent something after a rest."""
        client = arrival.client or self._welcome(arrival)
        try:
            if client.framed and client.transfer is None:
                rests = self._resume(client, arrival)
            elif arrival.data is None:
                rests = self._serve_when_it_sends(client)
            else:
                rests = self._serve_first(client, arrival.data, arrival.call, self._read_deadline())
        except HandedOver:
            return  # it is closed when it was taken, or it comes back
        except OSError:
            rests = False  # the client has left, or takes too long (TimeoutError): nobody to tell
        except BaseException:
            self.close(client)
            raise
        if not rests:
            self.close(client)

    def _welcome(self, arrival: Arrival[Call]) -> ClientSocket:
        client = ClientSocket(
            arrival.descriptor, self._connection_table.enter(arrival.number, time.monotonic_ns())
        )
        if (moving := arrival.moving) is not None:
            client.taken_over = client.lent = True
            client.input_had_ended = moving.input_may_have_ended
            self._connection_table.resume(client.entry, moving.opened_at, moving.requests)
        return client

    def _read_deadline(self) -> float:
        return time.monotonic() + self._limits.read_timeout

    # -- the end --

    def answer_for_the_door(self) -> None:
        """Answer clients that have come back and whose calls will not run.

        Called in the main thread, when nobody is at the door: all threads are busy.
        """
        outgoing = self._affinity.outgoing
        waiting = []
        while (client := outgoing.next_back()) is not None:
            if not self._give_up(client):
                waiting.append(client)
        for client in waiting:
            outgoing.comes_back(client)

    def _give_up(self, client: ClientSocket) -> bool:
        """Whether a client that has come back was answered, without waiting for it."""
        transfer = client.transfer
        assert transfer is not None
        if self._affinity.may_run_yet(transfer):  # asked first: this is looked at again and again
            return False
        data, arrived = transfer.moving.data, transfer.moving.arrived
        call = self._calls.prepare(data, arrived)
        refusal = self._affinity.why_not(call, transfer) if call is not None else None
        if refusal is None:
            return False
        reply = self._calls.refuse(refusal, client)
        framed = messages.is_framed(data)
        client.lent = True
        client.say_last(
            messages.to_frame(reply) + NO_MORE_REQUESTS if framed else messages.to_ascii(reply)
        )
        self.close(client)
        return True

    def take_back(self, client: ClientSocket) -> None:
        """Tell a client that has come back that nothing is taken up any more.

        Called in the main thread, which waits for no client to read.
        """
        assert client.transfer is not None
        client.lent = True
        framed = messages.is_framed(client.transfer.moving.data)
        client.say_last(NO_MORE_REQUESTS if framed else messages.to_ascii(self._not_run()))
        self.close(client)

    def reject(self, arrival: Arrival[Call]) -> None:
        """Tell a client that was waiting outside that nothing is taken up any more."""
        client = ClientSocket(
            arrival.descriptor, self._connection_table.enter(arrival.number, time.monotonic_ns())
        )
        try:
            self._say_shutting_down(client)
        except OSError:
            pass  # it has left by itself, or has sent nothing yet
        finally:
            self.close(client)

    def end_all_at_rest(self) -> None:
        """The same for kept connections, when nobody is at the door who would take them up.

        Called in the main thread, which waits for no client to read.
        """
        while (client := self._keep_alive.wake_any()) is not None:
            client.say_last(NO_MORE_REQUESTS)
            self.close(client)

    def let_go(self, client: ClientSocket) -> None:
        """Another worker has taken the client: end what this one has of it."""
        client.lent = False  # the connection goes on
        self.close(client)

    def close(self, client: ClientSocket) -> None:
        """End a connection."""
        self._connection_table.leave(client.entry)
        try:
            if client.framed:
                self._drainer.keep_no_longer(client)
                self._keep_alive.forget(client)
            client.close()
        except OSError:
            LOGGER.exception("A module has closed a client's socket")
        finally:
            if not client.given_up:
                self._gate.closed()

    def _say_shutting_down(self, client: ClientSocket) -> None:
        """Answer a client of which nothing was read yet, in the form that it speaks."""
        first = client.receive(LEFTOVER_SECONDS)
        if first and messages.is_framed(first):
            self._send(client, NO_MORE_REQUESTS)
        elif first:
            self._send(client, messages.to_ascii(self._not_run()))
        client.linger(LEFTOVER_SECONDS)

    # -- what it has sent first; each returns whether the connection rests now --

    def _serve_when_it_sends(self, client: ClientSocket) -> bool:
        deadline = self._read_deadline()
        if not client.wait(self._reader.patience(deadline), self._stops.all):
            return False
        if self._drainer.stopping:
            self._say_shutting_down(client)
            return False
        data = client.receive(self._limits.read_timeout)
        return self._serve_first(client, data, None, deadline)

    def _serve_first(
        self, client: ClientSocket, data: bytes, call: Call | None, deadline: float
    ) -> bool:
        if not data:
            return False
        if messages.is_framed(data):
            self._drainer.keep(client)
            return self._serve_framed(client, data, call, deadline)
        if call is not None:
            self._answer_one_shot(client, call, data)
        else:
            with self._drainer.waiting_for(client):
                self._serve_slow_one_shot(client, data, deadline)
        return False

    def _serve_slow_one_shot(self, client: ClientSocket, data: bytes, deadline: float) -> None:
        """One that is not all there yet, or wrong."""
        try:
            data = self._reader.read_one_shot(client, data, deadline)
            call = self._calls.resolve(data)
        except Draining:
            reply = self._not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, client)
        else:
            self._answer_one_shot(client, call, data)
            return
        self._send(client, messages.to_ascii(reply))
        client.linger(LINGER_SECONDS)

    def _answer_one_shot(self, client: ClientSocket, call: Call, data: bytes) -> None:
        try:
            reply = self._run(client, call, lambda: data, self._stops.all)
        except Draining:
            reply = self._not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, client)
        self._send(client, messages.to_ascii(reply))
        client.drop_what_follows()

    # -- framed clients; each returns whether the connection rests now --

    def _resume(self, client: ClientSocket, arrival: Arrival[Call]) -> bool:
        """Go on with a connection that has rested."""
        client.idle = False
        client.quiet_since = 0
        if not arrival.data:
            if client.input_may_have_ended:
                self._send(client, NO_MORE_REQUESTS)
            return False
        self._connection_table.heard(client.entry, time.monotonic_ns())
        return self._serve_framed(client, arrival.data, arrival.call, 0.0)

    def _serve_framed(
        self, client: ClientSocket, data: bytes, call: Call | None, deadline: float
    ) -> bool:
        """Serve all requests that are there, of which `call` is the first one, if it is known.

        `deadline` is when the first must be complete, 0.0: `read_timeout` from now.
        """
        at = 0  # where the request begins
        try:
            while True:
                end = self._reader.frame_end(data, at)
                if end > len(data):
                    data, at = self._reader.read_frame(client, data[at:], deadline), 0
                    if not data:
                        return False
                    continue
                reply = self._reply_to(client, data, at, end, call)
                self._send(client, messages.to_frame(reply))
                if self._drainer.exiting and not self._drainer.stays(client):
                    raise Draining
                if end == len(data):
                    return self._rest(client)
                at, call, deadline = end, None, 0.0
        except Draining:
            self._send(client, NO_MORE_REQUESTS)
        except Refusal as refusal:
            # The stream cannot be followed any further: say so, and that nothing more was read.
            reply = self._calls.refuse(refusal, client)
            self._send(client, messages.to_frame(reply) + NO_MORE_REQUESTS)
            self._step_aside()
            client.linger(LINGER_SECONDS)
        return False

    def _reply_to(
        self, client: ClientSocket, data: bytes, at: int, end: int, call: Call | None
    ) -> bytes:
        """The reply to the request that stands at `at` in `data`. Raises Draining, HandedOver."""
        try:
            if call is None:
                call = self._calls.resolve(data[at + messages.FRAME_HEADER.size : end])
            stop = self._stops.all if self._drainer.stays(client) else self._stops.acceptor
            return self._run(client, call, lambda: data[at:], stop)
        except Refusal as refusal:
            return self._calls.refuse(refusal, client)

    def _rest(self, client: ClientSocket) -> bool:
        """Wait for the next request. Raises Draining when that cannot be."""
        self._connection_table.is_doing(client.entry, IDLE)
        client.quiet_since = time.monotonic_ns()
        client.idle = True
        if not client.rested:
            self._let_others_come_first()
        try:
            self._keep_alive.rest(client)
        except OSError as error:
            LOGGER.error("A connection cannot be kept: %s", error.strerror)
            raise Draining from None
        return True  # it may be in another thread's hands by now

    # -- both --

    def _run(self, client: ClientSocket, call: Call, data: Callable[[], bytes], stop: int) -> bytes:
        """Admit a request and run it, where its state is; the reply.

        `data` is what was read of the client, from this request on. Raises Refusal, Draining,
        HandedOver.
        """
        if call.target.owned_as is None:
            if client.framed:
                self._even_out(client, call, data)
            self._calls.admit(call, client, stop, self._step_aside)
            return self._calls.run(call, client)
        session = self._affinity.join(call, client, data, stop)
        try:
            if not call.target.is_quick:
                self._step_aside()
            self._calls.admit(call, client, stop, self._step_aside)
            run_in(session)
            return self._calls.run(call, client)
        finally:
            run_in(None)
            self._affinity.sessions.leave(session)

    def _even_out(self, client: ClientSocket, call: Call, data: Callable[[], bytes]) -> None:
        """Pass a kept connection on to a worker that has fewer. Raises HandedOver when it has."""
        balance = self._balance
        if client.transfer is not None:
            self._affinity.stays(client)
            balance.was_not_taken(time.monotonic())
            return
        if not client.rested or call.arrived < balance.next_look or self._drainer.exiting:
            return
        request = data()
        if len(request) > MOST_INLINE:
            return  # where it is not taken, a copy would stay in memory until it is thrown away
        if self._affinity.sessions.is_live(client.process):
            return
        owner = balance.better_place(call.arrived, self._drainer.kept)
        if owner is None:
            return
        with self._drainer.held_off(client) as may_go:
            if not may_go:
                return
            self._affinity.goes_on(call, client, request, owner, TAKE_SECONDS)
        self._affinity.send(client)

    def _not_run(self) -> bytes:
        return self._calls.not_run(daemon_ends=self._drainer.daemon_ends)

    def _send(self, client: ClientSocket, reply: bytes) -> None:
        client.send(reply, self._limits.read_timeout)
