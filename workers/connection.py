"""A connection's life: read, admit, call, reply, release.

A one-shot client sends one request and is answered and closed; a framed one keeps its connection
for many. The first byte tells which it is. One thread at a time serves a connection, in blocking
code: a one-shot client's from its arrival to its close, a framed client's for as long as it has
requests. Then it is idle (`client/keepalive.py`), and no thread waits for it. Nor does one while a
request waits for room (`accept/admission.py`).

The rules for a client that is slow or gone: a request must be complete in time, see
`client/reader.py`; a client must take some of a reply every `read_timeout`; a framed connection may
be idle for `idle_timeout`. Room for a request is given back before the reply is sent, so a slow
reader holds nothing but its own connection.
"""

import logging
import math
import time
from collections.abc import Callable

from cpanbridge.supervisor.memory.connection_table import IDLE, WAITING
from cpanbridge.supervisor.wording import explain
from cpanbridge.workers.accept.admission import MustWait, WaitingRequest
from cpanbridge.workers.accept.ready_clients import Arrival
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import ConnectionDrainer, Draining
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.reader import Reader
from cpanbridge.workers.client.spool import spool
from cpanbridge.workers.endings import Endings
from cpanbridge.workers.protocol.framing import FRAME_HEADER, NO_MORE_REQUESTS, is_framed, to_frame
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.replies import to_ascii
from cpanbridge.workers.requests.calls import Call, Calls
from cpanbridge.workers.sessions.dispatch import HandedOver
from cpanbridge.workers.sessions.placement import Placement

LOGGER = logging.getLogger("cpanbridge.worker")

LINGER_SECONDS = 2.0


class _Waits(Exception):
    """There is no room for a request now."""

    def __init__(self, call: Call, data: bytes, waits_for: int) -> None:
        super().__init__(call, data, waits_for)
        self.call = call
        self.data = data  # what was read of the client, from this request on
        self.waits_for = waits_for  # WAITS_FOR_...


class Connections:
    """All connections of a worker. Called in the threads that serve them."""

    def __init__(
        self,
        reader: Reader,
        calls: Calls,
        placement: Placement,
        drainer: ConnectionDrainer,
        keep_alive: KeepAlive,
        endings: Endings,
    ) -> None:
        self._reader = reader
        self._calls = calls
        self._placement = placement
        self._drainer = drainer
        self._keep_alive = keep_alive
        self._endings = endings
        self._step_aside = reader.step_aside
        self._read_timeout = reader.limits.read_timeout
        self._connection_table = calls.connection_table
        self._admission = calls.admission

    def is_quick(self, arrival: Arrival[Call]) -> bool:
        """Whether a client is likely to be served before another thread could be woken."""
        client = arrival.client
        if arrival.call is None:
            return client is not None and not arrival.data  # a kept one has ended
        if arrival.call.target.is_ping:
            return True
        if client is not None and client.transfer is not None:
            return False  # its owner may have ended: that takes a while to deal with
        target = arrival.call.target
        # Handing a client over is quick, whatever the call takes there; if it is to run here after
        # all, `_run` steps aside.
        return target.is_quick or target.owned_as is not None

    def serve(self, arrival: Arrival[Call]) -> None:
        """Serve a client that was accepted, or that was idle and has sent something."""
        client = arrival.client or self._welcome(arrival)
        if arrival.ticket and arrival.call is not None:
            arrival.call.ticket = arrival.ticket
        ticket = arrival.ticket
        try:
            try:
                stays = self._go_on(client, arrival)
            except _Waits as waits:
                self._let_wait(client, waits)
                ticket = 0  # the client is another thread's by now, and so is its request
                return
        except HandedOver:
            return  # it is closed when it was taken, or it is returned
        except OSError:
            stays = False  # the client has left, or takes too long (TimeoutError)
        except BaseException:
            self._endings.close(client)
            raise
        finally:
            if ticket:
                self._admission.ended(ticket)
        if not stays:
            self._endings.close(client)

    def _go_on(self, client: ClientSocket, arrival: Arrival[Call]) -> bool:
        """Serve what it has sent; whether the connection is kept."""
        if client.framed and client.transfer is None:
            return self._resume(client, arrival)
        if arrival.data is None:
            return self._serve_when_it_sends(client)
        return self._serve_first(client, arrival.data, arrival.call, self._deadline())

    def _let_wait(self, client: ClientSocket, waits: "_Waits") -> None:
        """From now on no thread serves the client, until its request's turn has come."""
        call, request = waits.call, waits.call.request
        until = math.inf if request.timeout is None else call.arrived + request.timeout
        self._connection_table.is_doing(client.entry, WAITING)
        waiting = WaitingRequest(
            client, waits.data, call, None, call.ticket, call.arrived, until, call.is_movable
        )
        if (file := spool(waits.data)) is not None:
            waiting.data, waiting.call, waiting.file = b"", None, file
        self._admission.add(waiting, waits.waits_for)

    def _welcome(self, arrival: Arrival[Call]) -> ClientSocket:
        now = time.monotonic_ns()
        entry = self._connection_table.enter(arrival.number, now)
        client = ClientSocket(arrival.descriptor, entry, now)
        if (moving := arrival.moving) is not None:
            client.accepted_at = moving.accepted_at
            client.taken_over = client.duplicated = True
            client.input_ended_before = moving.input_may_have_ended
            self._connection_table.resume(entry, moving.accepted_at, moving.requests)
        return client

    def _deadline(self) -> float:
        return time.monotonic() + self._read_timeout

    # -- what it has sent first; each returns whether the connection is kept --

    def _serve_when_it_sends(self, client: ClientSocket) -> bool:
        deadline = self._deadline()
        if not client.wait(self._reader.receive_timeout(deadline), self._drainer.stops):
            return False
        if self._drainer.stopping:
            self._endings.say_shutting_down(client, self._read_timeout)
            return False
        data = client.receive(self._read_timeout)
        return self._serve_first(client, data, None, deadline)

    def _serve_first(
        self, client: ClientSocket, data: bytes, call: Call | None, deadline: float
    ) -> bool:
        if not data:
            return False
        if is_framed(data):
            self._drainer.add_framed(client)
            return self._serve_framed(client, data, call, deadline)
        if call is not None:
            self._answer_one_shot(client, call, data)
        else:
            with self._drainer.waiting_for(client):
                self._serve_slow_one_shot(client, data, deadline)
        return False

    def _serve_slow_one_shot(self, client: ClientSocket, data: bytes, deadline: float) -> None:
        """One whose request is not all there yet, or wrong."""
        try:
            data = self._reader.read_one_shot(client, data, deadline)
            call = self._calls.resolve(data)
        except Draining:
            reply = self._endings.not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, client)
        else:
            self._answer_one_shot(client, call, data)
            return
        self._send(client, to_ascii(reply))
        client.linger(LINGER_SECONDS)

    def _answer_one_shot(self, client: ClientSocket, call: Call, data: bytes) -> None:
        try:
            reply = self._run(client, call, lambda: data)
        except Draining:
            reply = self._endings.not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, client)
        self._send(client, to_ascii(reply))
        client.discard_input()

    # -- framed clients; each returns whether the connection is kept --

    def _resume(self, client: ClientSocket, arrival: Arrival[Call]) -> bool:
        """Go on with a connection that was idle."""
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
                self._send(client, to_frame(reply))
                if self._drainer.exiting and not self._drainer.stays(client):
                    raise Draining
                if end == len(data):
                    return self._keep(client)
                at, call, deadline = end, None, 0.0
        except Draining:
            self._send(client, NO_MORE_REQUESTS)
        except Refusal as refusal:
            # The stream cannot be followed any further: say so, and that nothing more was read.
            reply = self._calls.refuse(refusal, client)
            self._send(client, to_frame(reply) + NO_MORE_REQUESTS)
            self._step_aside()
            client.linger(LINGER_SECONDS)
        return False

    def _reply_to(
        self, client: ClientSocket, data: bytes, at: int, end: int, call: Call | None
    ) -> bytes:
        """The reply to the request that stands at `at` in `data`. Raises Draining, HandedOver."""
        try:
            if call is None:
                call = self._calls.resolve(data[at + FRAME_HEADER.size : end])
            return self._run(client, call, lambda: data[at:])
        except Refusal as refusal:
            return self._calls.refuse(refusal, client)

    def _keep(self, client: ClientSocket) -> bool:
        """Keep the connection for its next request. Raises Draining when that cannot be."""
        self._connection_table.is_doing(client.entry, IDLE)
        client.quiet_since = time.monotonic_ns()
        client.idle = True
        try:
            self._keep_alive.add(client)
        except OSError as error:
            LOGGER.error("A connection cannot be kept: %s", explain(error))
            raise Draining from None
        return True  # it may be in another thread's hands by now

    # -- both --

    def _run(self, client: ClientSocket, call: Call, data: Callable[[], bytes]) -> bytes:
        """Admit a request and run it, where its state is; the reply.

        `data` is what was read of the client, from this request on. Raises Refusal, Draining,
        HandedOver; _Waits when there is no room for it now.
        """
        if call.target.is_ping:
            return self._calls.ping(call, client)
        session = self._placement.enter(call, client, data)
        try:
            if session is not None and not call.target.is_quick:
                self._step_aside()
            self._calls.admit(call, client)
            return self._calls.run(call, client)
        except MustWait as wait:
            if self._drainer.stopping:
                raise Draining from None
            raise _Waits(call, data(), wait.waits_for) from None
        finally:
            if session is not None:
                self._placement.leave(session)

    def _send(self, client: ClientSocket, reply: bytes) -> None:
        client.send(reply, self._read_timeout)
