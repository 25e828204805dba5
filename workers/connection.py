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
from cpanbridge.supervisor.roster import IDLE
from cpanbridge.workers import protocol
from cpanbridge.workers.affinity import Affinity, HandedOver
from cpanbridge.workers.balance import TAKE_SECONDS, Balance
from cpanbridge.workers.calls import Call, Calls, Draining
from cpanbridge.workers.dismissal import Dismissal
from cpanbridge.workers.door import Arrival
from cpanbridge.workers.handover import MOST_INLINE
from cpanbridge.workers.keepalive import KeepAlive
from cpanbridge.workers.peer import Peer
from cpanbridge.workers.protocol import NO_MORE_REQUESTS, Refusal
from cpanbridge.workers.reading import Reader
from cpanbridge.workers.sessions import run_in

LOGGER = logging.getLogger("cpanbridge.worker")

LINGER_SECONDS = 2.0
LEFTOVER_SECONDS = 0.2


class Stops(NamedTuple):
    """Descriptors that become readable when a worker leaves."""

    door: int  # nobody is let in any more, and a kept connection takes up no further request
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
        dismissal: Dismissal,
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
        self._dismissal = dismissal
        self._keep_alive = keep_alive
        self._balance = balance
        self._stops = stops
        self._step_aside = step_aside
        self._let_others_come_first = let_others_come_first
        self._roster = calls.roster
        self._reader = Reader(limits, calls.roster, step_aside)

    def is_quick(self, arrival: Arrival[Call]) -> bool:
        """Whether a client is likely to be served before another thread could be woken."""
        peer = arrival.peer
        if arrival.call is None:
            return peer is not None and not arrival.data  # a kept one has ended
        if peer is not None and peer.journey is not None:
            return False  # its owner may not be there any more: that takes a while to see to
        target = arrival.call.target
        # Putting a client into another worker's postbox is quick, whatever the call takes there; if
        # it is to run here after all, `_run` sees to that.
        return target.is_quick or target.owned_as is not None

    def serve(self, arrival: Arrival[Call]) -> None:
        """Serve a client that was let in, or one that has sent something after a rest."""
        peer = arrival.peer or self._welcome(arrival)
        try:
            if peer.framed and peer.journey is None:
                rests = self._resume(peer, arrival)
            elif arrival.data is None:
                rests = self._serve_when_it_sends(peer)
            else:
                rests = self._serve_first(peer, arrival.data, arrival.call, self._read_deadline())
        except HandedOver:
            return  # it is closed when it was taken, or it comes back
        except OSError:
            rests = False  # the client has left, or takes too long (TimeoutError): nobody to tell
        except BaseException:
            self.close(peer)
            raise
        if not rests:
            self.close(peer)

    def _welcome(self, arrival: Arrival[Call]) -> Peer:
        peer = Peer(arrival.descriptor, self._roster.enter(arrival.number, time.monotonic_ns()))
        if (passenger := arrival.passenger) is not None:
            peer.taken_over = peer.lent = True
            peer.was_dismissed = passenger.may_be_dismissed
            self._roster.resume(peer.entry, passenger.opened_at, passenger.requests)
        return peer

    def _read_deadline(self) -> float:
        return time.monotonic() + self._limits.read_timeout

    # -- the end --

    def answer_for_the_door(self) -> None:
        """Answer clients that have come back and whose calls will not run.

        Called in the main thread, when nobody is at the door: all threads are busy.
        """
        outgoing = self._affinity.outgoing
        waiting = []
        while (peer := outgoing.next_back()) is not None:
            if not self._give_up(peer):
                waiting.append(peer)
        for peer in waiting:
            outgoing.comes_back(peer)

    def _give_up(self, peer: Peer) -> bool:
        """Whether a client that has come back was answered, without waiting for it."""
        journey = peer.journey
        assert journey is not None
        if self._affinity.may_run_yet(journey):  # asked first: this is looked at again and again
            return False
        data, arrived = journey.passenger.data, journey.passenger.arrived
        call = self._calls.prepare(data, arrived)
        refusal = self._affinity.why_not(call, journey) if call is not None else None
        if refusal is None:
            return False
        reply = self._calls.refuse(refusal, peer)
        framed = protocol.is_framed(data)
        peer.lent = True
        peer.say_last(
            protocol.to_frame(reply) + NO_MORE_REQUESTS if framed else protocol.to_ascii(reply)
        )
        self.close(peer)
        return True

    def take_back(self, peer: Peer) -> None:
        """Tell a client that has come back that nothing is taken up any more.

        Called in the main thread, which waits for no client to read.
        """
        assert peer.journey is not None
        peer.lent = True
        framed = protocol.is_framed(peer.journey.passenger.data)
        peer.say_last(NO_MORE_REQUESTS if framed else protocol.to_ascii(self._not_run()))
        self.close(peer)

    def turn_away(self, arrival: Arrival[Call]) -> None:
        """Tell a client that was waiting outside that nothing is taken up any more."""
        peer = Peer(arrival.descriptor, self._roster.enter(arrival.number, time.monotonic_ns()))
        try:
            self._say_shutting_down(peer)
        except OSError:
            pass  # it has left by itself, or has sent nothing yet
        finally:
            self.close(peer)

    def end_all_at_rest(self) -> None:
        """The same for kept connections, when nobody is at the door who would take them up.

        Called in the main thread, which waits for no client to read.
        """
        while (peer := self._keep_alive.wake_any()) is not None:
            peer.say_last(NO_MORE_REQUESTS)
            self.close(peer)

    def let_go(self, peer: Peer) -> None:
        """Another worker has taken the client: end what this one has of it."""
        peer.lent = False  # the connection goes on
        self.close(peer)

    def close(self, peer: Peer) -> None:
        """End a connection."""
        self._roster.leave(peer.entry)
        try:
            if peer.framed:
                self._dismissal.keep_no_longer(peer)
                self._keep_alive.forget(peer)
            peer.close()
        except OSError:
            LOGGER.exception("A module has closed a client's socket")
        finally:
            if not peer.given_up:
                self._gate.closed()

    def _say_shutting_down(self, peer: Peer) -> None:
        """Answer a client of which nothing was read yet, in the form that it speaks."""
        first = peer.receive(LEFTOVER_SECONDS)
        if first and protocol.is_framed(first):
            self._send(peer, NO_MORE_REQUESTS)
        elif first:
            self._send(peer, protocol.to_ascii(self._not_run()))
        peer.linger(LEFTOVER_SECONDS)

    # -- what it has sent first; each returns whether the connection rests now --

    def _serve_when_it_sends(self, peer: Peer) -> bool:
        deadline = self._read_deadline()
        if not peer.wait(self._reader.patience(deadline), self._stops.all):
            return False
        if self._dismissal.stopping:
            self._say_shutting_down(peer)
            return False
        data = peer.receive(self._limits.read_timeout)
        return self._serve_first(peer, data, None, deadline)

    def _serve_first(self, peer: Peer, data: bytes, call: Call | None, deadline: float) -> bool:
        if not data:
            return False
        if protocol.is_framed(data):
            self._dismissal.keep(peer)
            return self._serve_framed(peer, data, call, deadline)
        if call is not None:
            self._answer_one_shot(peer, call, data)
        else:
            with self._dismissal.waiting_for(peer):
                self._serve_slow_one_shot(peer, data, deadline)
        return False

    def _serve_slow_one_shot(self, peer: Peer, data: bytes, deadline: float) -> None:
        """One that is not all there yet, or wrong."""
        try:
            data = self._reader.read_one_shot(peer, data, deadline)
            call = self._calls.resolve(data)
        except Draining:
            reply = self._not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, peer)
        else:
            self._answer_one_shot(peer, call, data)
            return
        self._send(peer, protocol.to_ascii(reply))
        peer.linger(LINGER_SECONDS)

    def _answer_one_shot(self, peer: Peer, call: Call, data: bytes) -> None:
        try:
            reply = self._run(peer, call, lambda: data, self._stops.all)
        except Draining:
            reply = self._not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, peer)
        self._send(peer, protocol.to_ascii(reply))
        peer.drop_what_follows()

    # -- framed clients; each returns whether the connection rests now --

    def _resume(self, peer: Peer, arrival: Arrival[Call]) -> bool:
        """Go on with a connection that has rested."""
        peer.idle = False
        peer.quiet_since = 0
        if not arrival.data:
            if peer.may_be_dismissed:
                self._send(peer, NO_MORE_REQUESTS)
            return False
        self._roster.heard(peer.entry, time.monotonic_ns())
        return self._serve_framed(peer, arrival.data, arrival.call, 0.0)

    def _serve_framed(self, peer: Peer, data: bytes, call: Call | None, deadline: float) -> bool:
        """Serve all requests that are there, of which `call` is the first one, if it is known.

        `deadline` is when the first must be complete, 0.0: `read_timeout` from now.
        """
        at = 0  # where the request begins
        try:
            while True:
                end = self._reader.frame_end(data, at)
                if end > len(data):
                    data, at = self._reader.read_frame(peer, data[at:], deadline), 0
                    if not data:
                        return False
                    continue
                reply = self._reply_to(peer, data, at, end, call)
                self._send(peer, protocol.to_frame(reply))
                if self._dismissal.leaving and not self._dismissal.stays(peer):
                    raise Draining
                if end == len(data):
                    return self._rest(peer)
                at, call, deadline = end, None, 0.0
        except Draining:
            self._send(peer, NO_MORE_REQUESTS)
        except Refusal as refusal:
            # The stream cannot be followed any further: say so, and that nothing more was read.
            reply = self._calls.refuse(refusal, peer)
            self._send(peer, protocol.to_frame(reply) + NO_MORE_REQUESTS)
            self._step_aside()
            peer.linger(LINGER_SECONDS)
        return False

    def _reply_to(self, peer: Peer, data: bytes, at: int, end: int, call: Call | None) -> bytes:
        """The reply to the request that stands at `at` in `data`. Raises Draining, HandedOver."""
        try:
            if call is None:
                call = self._calls.resolve(data[at + protocol.FRAME_HEADER.size : end])
            stop = self._stops.all if self._dismissal.stays(peer) else self._stops.door
            return self._run(peer, call, lambda: data[at:], stop)
        except Refusal as refusal:
            return self._calls.refuse(refusal, peer)

    def _rest(self, peer: Peer) -> bool:
        """Wait for the next request. Raises Draining when that cannot be."""
        self._roster.is_doing(peer.entry, IDLE)
        peer.quiet_since = time.monotonic_ns()
        peer.idle = True
        if not peer.rested:
            self._let_others_come_first()
        try:
            self._keep_alive.rest(peer)
        except OSError as error:
            LOGGER.error("A connection cannot be kept: %s", error.strerror)
            raise Draining from None
        return True  # it may be in another thread's hands by now

    # -- both --

    def _run(self, peer: Peer, call: Call, data: Callable[[], bytes], stop: int) -> bytes:
        """Admit a request and run it, where its state is; the reply.

        `data` is what was read of the client, from this request on. Raises Refusal, Draining,
        HandedOver.
        """
        if call.target.owned_as is None:
            if peer.framed:
                self._even_out(peer, call, data)
            self._calls.admit(call, peer, stop, self._step_aside)
            return self._calls.run(call, peer)
        session = self._affinity.join(call, peer, data, stop)
        try:
            if not call.target.is_quick:
                self._step_aside()
            self._calls.admit(call, peer, stop, self._step_aside)
            run_in(session)
            return self._calls.run(call, peer)
        finally:
            run_in(None)
            self._affinity.sessions.leave(session)

    def _even_out(self, peer: Peer, call: Call, data: Callable[[], bytes]) -> None:
        """Pass a kept connection on to a worker that has fewer. Raises HandedOver when it has."""
        balance = self._balance
        if peer.journey is not None:
            self._affinity.stays(peer)
            balance.was_not_taken(time.monotonic())
            return
        if not peer.rested or call.arrived < balance.next_look or self._dismissal.leaving:
            return
        request = data()
        if len(request) > MOST_INLINE:
            return  # where it is not taken, a copy would stay in memory until it is thrown away
        if self._affinity.sessions.is_live(peer.client):
            return
        owner = balance.better_place(call.arrived, self._dismissal.kept)
        if owner is None:
            return
        with self._dismissal.held_off(peer) as may_go:
            if not may_go:
                return
            self._affinity.goes_on(call, peer, request, owner, TAKE_SECONDS)
        self._affinity.send(peer)

    def _not_run(self) -> bytes:
        return self._calls.not_run(daemon_ends=self._dismissal.daemon_ends)

    def _send(self, peer: Peer, reply: bytes) -> None:
        peer.send(reply, self._limits.read_timeout)
