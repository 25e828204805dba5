"""A connection's life: read, admit, call, reply, release.

One thread serves one connection from its arrival to its close, in blocking code. A one-shot client
sends one request and is answered and closed; a framed one keeps its connection for many. Which it
is, the first byte tells.

The rules for a peer that is slow or gone: a request must be complete within `read_timeout` of its
first byte (of the accept, for a connection's first), and some of it must come every
`stale_timeout`; a reply must find a reader that takes some of it every `read_timeout`; a framed
connection may rest for `idle_timeout`. Room for a request is given back before the reply is sent,
so a slow reader holds nothing but its own connection.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.roster import IDLE, READING
from cpanbridge.workers import protocol
from cpanbridge.workers.affinity import Affinity, HandedOver
from cpanbridge.workers.calls import Call, Calls, Draining
from cpanbridge.workers.door import Arrival
from cpanbridge.workers.peer import Peer
from cpanbridge.workers.protocol import NO_MORE_REQUESTS, Refusal
from cpanbridge.workers.scanner import ObjectScanner

LOGGER = logging.getLogger("cpanbridge.worker")

LINGER_SECONDS = 2.0
LEFTOVER_SECONDS = 0.2


class Stops(NamedTuple):
    """Descriptors that become readable when a worker leaves."""

    door: int  # nobody is let in any more, and a kept connection takes up no further request
    all: int  # no request is taken up any more


def _unread(frame: bytes, rest: bytearray) -> bytes:
    """A framed client's bytes from one request on, as they were read."""
    return protocol.to_frame(frame) + bytes(rest)


class Connections:
    """What all connections of a worker need, and the life of each. Called from its threads."""

    def __init__(
        self, limits: Limits, gate: Gate, calls: Calls, affinity: Affinity, stops: Stops
    ) -> None:
        self._limits = limits
        self._gate = gate
        self._calls = calls
        self._affinity = affinity
        self._stops = stops
        self._roster = calls.roster
        self._leaving = False
        self._stopping = False
        self._daemon_ends = False
        self._framed: set[Peer] = set()  # those whose thread may wait for the client
        self._one_shot: set[Peer] = set()
        self._reading_lock = threading.Lock()

    def leave(self) -> None:
        """Kept connections end after what they run; one-shot clients are served to their end.

        For a worker whose place another one takes. A connection stays as long as its client has a
        session here. Called in the main thread, before `stops.door` is written, and when sessions
        have ended.
        """
        with self._reading_lock:
            self._leaving = True
            for peer in self._framed:
                # One that is on its way is another worker's by now, or comes back.
                if peer.journey is None and not self._stays(peer):
                    peer.dismiss()

    def stop(self, *, daemon_ends: bool) -> None:
        """No connection takes up a further request.

        For a daemon that ends, or a worker whose time to leave is over. Called in the main thread,
        before `stops.all` is written.
        """
        with self._reading_lock:
            self._leaving = self._stopping = True
            self._daemon_ends = daemon_ends
            for peer in self._framed | self._one_shot:
                if peer.journey is None:
                    peer.dismiss()

    def _stays(self, peer: Peer) -> bool:
        """Whether a kept connection goes on in a worker that leaves."""
        return not self._stopping and self._affinity.sessions.is_live(peer.client)

    def dismiss_stale(self) -> None:
        """Close the connections whose clients have been silent for `stale_timeout`, now."""
        with self._reading_lock:
            peers = self._framed | self._one_shot
        now, limit = time.monotonic_ns(), self._limits.stale_timeout * 1e9
        for peer in peers:
            if peer.quiet_since and now - peer.quiet_since > limit:
                peer.dismiss(stale=True)

    def is_quick(self, arrival: Arrival[Call]) -> bool:
        """Whether a client is likely to be served before another thread could be woken."""
        if arrival.call is None or arrival.peer is not None:
            return False
        target = arrival.call.target
        if target.is_quick:
            return True
        # Putting a client into another worker's postbox is quick, whatever the call takes there.
        return target.owned_as is not None and not self._affinity.may_be_here(arrival.client)

    def serve(self, arrival: Arrival[Call]) -> None:
        """Serve a client that was let in, until it is closed."""
        peer = arrival.peer or self._welcome(arrival)
        try:
            if arrival.call is None or arrival.data is None:
                self._serve_slowly(peer, arrival.data)
            else:
                self._answer_one_shot(peer, arrival.call, arrival.data)
        except HandedOver:
            return  # it is closed when it was taken, or it comes back
        except OSError:
            pass  # the client has left, or takes too long (TimeoutError): nobody to tell
        except BaseException:
            self.close(peer)
            raise
        self.close(peer)

    def _welcome(self, arrival: Arrival[Call]) -> Peer:
        peer = Peer(arrival.client, self._roster.enter(arrival.number, time.monotonic_ns()))
        if arrival.history is not None:
            peer.taken_over = peer.lent = True
            self._roster.resume(peer.entry, *arrival.history)
        return peer

    def take_back(self, peer: Peer) -> None:
        """Tell a client that has come back that nothing is taken up any more."""
        assert peer.journey is not None
        peer.lent = True
        try:
            if protocol.is_framed(peer.journey.passenger.data):
                self._send(peer, NO_MORE_REQUESTS)
            else:
                self._send(peer, protocol.to_ascii(self._not_run()))
        except OSError:
            pass  # it has left by itself
        finally:
            self.close(peer)

    def turn_away(self, arrival: Arrival[Call]) -> None:
        """Tell a client that was waiting outside that nothing is taken up any more."""
        peer = Peer(arrival.client, self._roster.enter(arrival.number, time.monotonic_ns()))
        try:
            self._say_shutting_down(peer)
        except OSError:
            pass  # it has left by itself, or has sent nothing yet
        finally:
            self.close(peer)

    def let_go(self, peer: Peer) -> None:
        """Another worker has taken the client: end what this one has of it."""
        peer.lent = False  # the connection goes on
        self.close(peer)

    def close(self, peer: Peer) -> None:
        """End a connection."""
        self._roster.leave(peer.entry)
        try:
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

    def _serve_slowly(self, peer: Peer, data: bytes | None) -> None:
        """All but the complete one-shot request: it is not all there, wrong, or framed."""
        deadline = time.monotonic() + self._limits.read_timeout
        if data is None:
            if not peer.wait(self._patience(deadline), self._stops.all):
                return
            if self._stopping:
                self._say_shutting_down(peer)
                return
            data = peer.receive(self._limits.read_timeout)
        if not data:
            return
        if protocol.is_framed(data):
            peer.framed = True
            with self._interruptible(peer, self._framed):
                self._serve_framed(peer, bytearray(data), deadline)
        else:
            with self._interruptible(peer, self._one_shot):
                self._serve_one_shot(peer, data, deadline)

    def _serve_one_shot(self, peer: Peer, data: bytes, deadline: float) -> None:
        try:
            call, data = self._read_one_shot(peer, data, deadline)
        except Draining:
            reply = self._not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, peer)
        else:
            self._answer_one_shot(peer, call, data)
            return
        self._send(peer, protocol.to_ascii(reply))
        peer.linger(LINGER_SECONDS)

    def _run(self, peer: Peer, call: Call, data: Callable[[], bytes], stop: int) -> bytes:
        """Admit a request and run it, where its state is; the reply.

        `data` is what was read of the client, from this request on. Raises Refusal, Draining,
        HandedOver.
        """
        if call.target.owned_as is None:
            self._calls.admit(call, peer, stop)
            return self._calls.run(call, peer)
        with self._affinity.session(call, peer, data, stop):
            self._calls.admit(call, peer, stop)
            return self._calls.run(call, peer)

    def _answer_one_shot(self, peer: Peer, call: Call, data: bytes) -> None:
        try:
            reply = self._run(peer, call, lambda: data, self._stops.all)
        except Draining:
            reply = self._not_run()
        except Refusal as refusal:
            reply = self._calls.refuse(refusal, peer)
        self._send(peer, protocol.to_ascii(reply))
        peer.drop_what_follows()

    def _read_one_shot(self, peer: Peer, data: bytes, deadline: float) -> tuple[Call, bytes]:
        """Read to the end of the request; what it is, and its bytes. Raises Refusal, Draining."""
        scanner = ObjectScanner()
        pieces = [data]
        size = len(data)
        while not scanner.feed(data):
            if size > self._limits.max_request_size:
                break
            data = self._receive_more(peer, deadline)
            if not data:
                break  # the client's end of file: the parser says what is missing
            pieces.append(data)
            size += len(data)
        if size > self._limits.max_request_size:
            raise self._too_large(f"over {self._limits.max_request_size}")
        data = b"".join(pieces)
        return self._calls.resolve(data), data

    def _serve_framed(self, peer: Peer, buffer: bytearray, deadline: float) -> None:
        """Serve frame after frame, until the client ends, rests too long, or the worker drains."""
        try:
            while True:
                frame = self._next_frame(peer, buffer, deadline)
                if frame is None:
                    return
                try:
                    call = self._calls.resolve(frame)
                    stop = self._stops.all if self._stays(peer) else self._stops.door
                    unread = partial(_unread, frame, buffer)
                    reply = self._run(peer, call, unread, stop)
                except Refusal as refusal:
                    reply = self._calls.refuse(refusal, peer)
                self._send(peer, protocol.to_frame(reply))
                if self._leaving and not self._stays(peer):
                    raise Draining
                deadline = 0.0
        except Draining:
            self._send(peer, NO_MORE_REQUESTS)
        except Refusal as refusal:
            # The stream cannot be followed any further: say so, and that nothing more was read.
            reply = self._calls.refuse(refusal, peer)
            self._send(peer, protocol.to_frame(reply) + NO_MORE_REQUESTS)
            peer.linger(LINGER_SECONDS)

    def _next_frame(self, peer: Peer, buffer: bytearray, deadline: float) -> bytes | None:
        """The next request's bytes; None when the client has ended the connection.

        `deadline` is when a frame that has begun must be complete; 0.0: one that has not begun yet
        gets `read_timeout` from its first byte. Raises Draining, Refusal.
        """
        length = -1
        while True:
            if length < 0 and len(buffer) >= 4:
                (length,) = protocol.FRAME_HEADER.unpack_from(buffer)
                if length > self._limits.max_request_size:
                    raise self._too_large(f"{length}")
            if 0 <= length <= len(buffer) - 4:
                frame = bytes(memoryview(buffer)[4 : 4 + length])
                del buffer[: 4 + length]
                return frame
            if buffer:
                deadline = deadline or time.monotonic() + self._limits.read_timeout
                data = self._receive_more(peer, deadline)
            else:
                data = self._receive_first(peer)
            if not data:
                return None
            buffer += data

    def _receive_first(self, peer: Peer) -> bytes:
        """The first bytes of a kept connection's next request. Raises Draining."""
        self._roster.is_doing(peer.entry, IDLE)
        try:
            data = self._wait_for(peer, self._limits.idle_timeout)
        except TimeoutError:
            raise Draining from None  # it rested for idle_timeout
        if not data and peer.dismissed:
            raise Draining
        self._roster.heard(peer.entry, time.monotonic_ns())
        return data

    def _receive_more(self, peer: Peer, deadline: float) -> bytes:
        """More bytes of a request that has begun. Raises Refusal when none come, Draining."""
        self._roster.is_doing(peer.entry, READING)
        try:
            data = self._wait_for(peer, self._patience(deadline))
        except TimeoutError:
            raise self._too_slow(deadline) from None
        if not data and peer.stale:
            raise self._too_slow(deadline)
        if not data and peer.dismissed:
            raise Draining
        self._roster.heard(peer.entry, time.monotonic_ns())
        return data

    @staticmethod
    def _wait_for(peer: Peer, seconds: float) -> bytes:
        """Receive, while it is the client's turn to be heard."""
        peer.quiet_since = time.monotonic_ns()
        try:
            return peer.receive(seconds)
        finally:
            peer.quiet_since = 0

    def _patience(self, deadline: float) -> float:
        """How long a client may be silent now."""
        return min(deadline - time.monotonic(), self._limits.stale_timeout)

    def _not_run(self) -> bytes:
        return self._calls.not_run(daemon_ends=self._daemon_ends)

    def _too_large(self, size: str) -> Refusal:
        limit = self._limits.max_request_size
        message = (
            f"Invalid request: {size} bytes; at most {limit} are allowed (limits.max_request_size)"
        )
        return Refusal("InvalidRequest", message)

    def _too_slow(self, deadline: float) -> Refusal:
        limits = self._limits
        if time.monotonic() < deadline:
            silent = f"nothing came for {limits.stale_timeout:g} s (limits.stale_timeout)"
            return Refusal("InvalidRequest", f"Invalid request: not complete, and {silent}")
        message = f"not complete after {limits.read_timeout:g} s (limits.read_timeout)"
        return Refusal("InvalidRequest", f"Invalid request: {message}")

    @contextlib.contextmanager
    def _interruptible(self, peer: Peer, peers: set[Peer]) -> Iterator[None]:
        """While a thread may wait for this client, it can be dismissed."""
        with self._reading_lock:
            peers.add(peer)
            # One that was handed over has its call here; whether it stays is seen after that.
            leaves = self._leaving and peers is self._framed and not peer.taken_over
            if self._stopping or leaves:
                peer.dismiss()
        try:
            yield
        finally:
            with self._reading_lock:
                peers.discard(peer)

    def _send(self, peer: Peer, reply: bytes) -> None:
        peer.send(reply, self._limits.read_timeout)
