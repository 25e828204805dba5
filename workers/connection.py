"""A connection's life: read, admit, call, reply, release.

One thread serves one connection from its arrival to its close, in blocking code. A one-shot client
sends one request and is answered and closed; a framed one keeps its connection for many. Which it
is, the first byte tells.

The rules for a peer that is slow or gone: a request must be complete within `read_timeout` of its
first byte (of the accept, for a connection's first); a reply must find a reader that takes
some of it every `read_timeout`; a framed connection may rest for `idle_timeout`. Room for a request
is given back before the reply is sent, so a slow reader holds nothing but its own connection.
"""

import contextlib
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Gate
from cpanbridge.workers import modules, protocol, security
from cpanbridge.workers.door import Arrival
from cpanbridge.workers.modules import Registry, Target
from cpanbridge.workers.peer import Peer
from cpanbridge.workers.protocol import NO_MORE_REQUESTS, Refusal, Request
from cpanbridge.workers.scanner import ObjectScanner

LOGGER = logging.getLogger("cpanbridge.worker")

LINGER_SECONDS = 2.0
LEFTOVER_SECONDS = 0.2
# A frame's length is below 9 * 2**24 (see config.MAX_REQUEST_SIZE); 9 is the first white space.
FIRST_BYTE_FRAMED = range(9)


class Call(NamedTuple):
    """A request together with the function that it names."""

    request: Request
    target: Target


class Draining(Exception):
    """The worker is about to leave and takes up no further request."""


class Connections:
    """What all connections of a worker need, and the life of each. Called from its threads."""

    def __init__(
        self, settings: Settings, worker: int, gate: Gate, registry: Registry, stop: int
    ) -> None:
        self._limits = settings.limits
        self._debug = settings.debug
        self._worker = worker
        self._gate = gate
        self._registry = registry
        self._stop = stop
        self._security = security.SecurityLog(worker)
        self._pid = os.getpid()
        self._draining = False
        self._reading: set[Peer] = set()
        self._reading_lock = threading.Lock()

    def drain(self) -> None:
        """From now on no connection takes up a further request. Called in the main thread."""
        with self._reading_lock:
            self._draining = True
            for peer in self._reading:
                peer.stop_reading()

    def prepare(self, data: bytes) -> Call | None:
        """The call in a one-shot client's first bytes, if they are all of it and it may run."""
        try:
            request = protocol.decode_if_complete(data, self._limits)
            return None if request is None else self._resolve(request)
        except Refusal:
            return None  # it will be found again, and told

    @staticmethod
    def is_quick(arrival: Arrival[Call]) -> bool:
        """Whether a client is likely to be served before another thread could be woken."""
        return arrival.call is not None and arrival.call.target.is_quick

    def serve(self, arrival: Arrival[Call]) -> None:
        """Serve a client that was let in, until it is closed."""
        peer = Peer(arrival.client)
        try:
            if arrival.call is not None:
                self._answer_one_shot(peer, arrival.call)
            else:
                self._serve_slowly(peer, arrival.data)
        except OSError:
            pass  # the client has left, or takes too long (TimeoutError): nobody to tell
        finally:
            self._close(peer)

    def turn_away(self, arrival: Arrival[Call]) -> None:
        """Tell a client that was waiting outside that nothing is taken up any more."""
        peer = Peer(arrival.client)
        try:
            self._say_shutting_down(peer)
        except OSError:
            pass  # it has left by itself, or has sent nothing yet
        finally:
            self._close(peer)

    def _close(self, peer: Peer) -> None:
        try:
            peer.socket.close()
        except OSError:
            LOGGER.exception("A module has closed a client's socket")
        finally:
            self._gate.closed()

    def _say_shutting_down(self, peer: Peer) -> None:
        """Answer a client of which nothing was read yet, in the form that it speaks."""
        first = peer.receive(LEFTOVER_SECONDS)
        if first and first[0] in FIRST_BYTE_FRAMED:
            self._send(peer, NO_MORE_REQUESTS)
        elif first:
            self._send(peer, protocol.to_ascii(self._shutting_down()))
        peer.linger(LEFTOVER_SECONDS)

    def _serve_slowly(self, peer: Peer, data: bytes | None) -> None:
        """All but the complete one-shot request: it is not all there, wrong, or framed."""
        deadline = time.monotonic() + self._limits.read_timeout
        if data is None:
            if not peer.wait(self._limits.read_timeout, self._stop):
                return
            if self._draining:
                self._say_shutting_down(peer)
                return
            data = peer.receive(self._limits.read_timeout)
        if not data:
            return
        with self._interruptible(peer):
            if data[0] in FIRST_BYTE_FRAMED:
                self._serve_framed(peer, bytearray(data), deadline)
            else:
                self._serve_one_shot(peer, data, deadline)

    def _serve_one_shot(self, peer: Peer, data: bytes, deadline: float) -> None:
        try:
            call = self._read_one_shot(peer, data, deadline)
        except Draining:
            reply = self._shutting_down()
        except Refusal as refusal:
            reply = self._refuse(peer, refusal)
        else:
            self._answer_one_shot(peer, call)
            return
        self._send(peer, protocol.to_ascii(reply))
        peer.linger(LINGER_SECONDS)

    def _answer_one_shot(self, peer: Peer, call: Call) -> None:
        try:
            self._admit()
            reply = self._run(call)
        except Draining:
            reply = self._shutting_down()
        self._send(peer, protocol.to_ascii(reply))
        peer.drop_what_follows()

    def _read_one_shot(self, peer: Peer, data: bytes, deadline: float) -> Call:
        """Read until the request is complete. Raises Refusal, Draining."""
        scanner = ObjectScanner()
        pieces = [data]
        size = len(data)
        while not scanner.feed(data):
            if size > self._limits.max_request_size:
                break
            try:
                data = peer.receive(deadline - time.monotonic())
            except TimeoutError:
                raise self._too_slow() from None
            if not data:
                if self._draining:
                    raise Draining
                break  # the client's end of file: the parser says what is missing
            pieces.append(data)
            size += len(data)
        if size > self._limits.max_request_size:
            raise self._too_large(f"over {self._limits.max_request_size}")
        return self._resolve(protocol.decode(b"".join(pieces), self._limits))

    def _serve_framed(self, peer: Peer, buffer: bytearray, deadline: float) -> None:
        """Serve frame after frame, until the client ends, rests too long, or the worker drains."""
        try:
            while True:
                frame = self._next_frame(peer, buffer, deadline)
                if frame is None:
                    return
                try:
                    call = self._resolve(protocol.decode(frame, self._limits))
                except Refusal as refusal:
                    reply = self._refuse(peer, refusal)
                else:
                    self._admit()
                    reply = self._run(call)
                self._send(peer, protocol.to_frame(reply))
                if self._draining:
                    raise Draining
                deadline = 0.0
        except Draining:
            self._send(peer, NO_MORE_REQUESTS)
        except Refusal as refusal:
            # The stream cannot be followed any further: say so, and that nothing more was read.
            reply = self._refuse(peer, refusal)
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
            if buffer and not deadline:
                deadline = time.monotonic() + self._limits.read_timeout
            seconds = deadline - time.monotonic() if buffer else self._limits.idle_timeout
            try:
                data = peer.receive(seconds)
            except TimeoutError:
                if buffer:
                    raise self._too_slow() from None
                raise Draining from None  # it rested for idle_timeout
            if self._draining:
                raise Draining
            if not data:
                return None
            buffer += data

    def _resolve(self, request: Request) -> Call:
        return Call(request, self._registry.find(request))

    def _admit(self) -> None:
        """Wait until a request may run, and charge it. Raises Draining."""
        if not self._gate.enter(self._gate.admitted, self._stop, connection=False):
            raise Draining

    def _run(self, call: Call) -> bytes:
        """Run an admitted request and return the reply; its room is given back in any case."""
        request = call.request
        started = time.monotonic_ns()
        succeeded = False
        try:
            outcome = modules.call(call.target, request)
            if os.getpid() != self._pid:
                # The function has forked, and this is the child: the client is the parent's.
                os._exit(0)
            if outcome.error is not None:
                return self._failure(request, outcome.error)
            duration_ms = (time.monotonic_ns() - started) / 1e6
            reply = protocol.encode_success(request, outcome.result, duration_ms, self._worker)
            succeeded = True
            return reply
        except Refusal as refusal:
            return protocol.encode_failure(refusal.message, refusal.kind, request.request_id)
        finally:
            duration_ns = time.monotonic_ns() - started
            self._gate.finished(succeeded, duration_ns)
            call.target.took(duration_ns)

    def _failure(self, request: Request, error: BaseException) -> bytes:
        trace = None
        if self._debug:
            trace = "".join(traceback.format_exception(error))
            LOGGER.info(
                "%s.%s raised %s (request %s of %s)",
                request.module,
                request.function,
                type(error).__name__,
                request.request_id or "without id",
                request.perl_caller or "an unknown caller",
            )
        message = protocol.message_of(error) or type(error).__name__
        text = f"Error in {request.module}.{request.function}: {message}"
        return protocol.encode_failure(text, type(error).__name__, request.request_id, trace)

    def _refuse(self, peer: Peer, refusal: Refusal) -> bytes:
        """Count a request that is not run, and return the reply that says why."""
        is_event = security.is_event(refusal.kind)
        self._gate.refused(invalid=refusal.kind == "InvalidRequest", security_event=is_event)
        if is_event:
            self._security.event(refusal, peer.socket)
        return protocol.encode_failure(refusal.message, refusal.kind, refusal.request_id)

    def _shutting_down(self) -> bytes:
        self._gate.refused(invalid=False, security_event=False)
        message = "The daemon is shutting down; the call was not run"
        return protocol.encode_failure(message, "ShuttingDown", None)

    def _too_large(self, size: str) -> Refusal:
        limit = self._limits.max_request_size
        message = (
            f"Invalid request: {size} bytes; at most {limit} are allowed (limits.max_request_size)"
        )
        return Refusal("InvalidRequest", message)

    def _too_slow(self) -> Refusal:
        seconds = self._limits.read_timeout
        message = f"Invalid request: not complete after {seconds:g} s (limits.read_timeout)"
        return Refusal("InvalidRequest", message)

    @contextlib.contextmanager
    def _interruptible(self, peer: Peer) -> Iterator[None]:
        """While a thread may wait for this client, `drain` can wake it."""
        with self._reading_lock:
            self._reading.add(peer)
            if self._draining:
                peer.stop_reading()
        try:
            yield
        finally:
            with self._reading_lock:
                self._reading.discard(peer)

    def _send(self, peer: Peer, reply: bytes) -> None:
        peer.send(reply, self._limits.read_timeout)
