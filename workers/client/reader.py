"""Reading requests from clients that may be slow or gone.

A request must be complete within `read_timeout` of its first byte, or of the accept if it is a
connection's first. Some of it must come every `stale_timeout`.

Called from the threads that serve clients, and each thread waits for its client here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.connection_table import READING, ConnectionTableWriter
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import Draining
from cpanbridge.workers.protocol.framing import FRAME_HEADER
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.scanner import ObjectScanner


@dataclass(eq=False)
class Reader:
    """One worker's reader. `step_aside` is called before a thread waits for a client."""

    limits: Limits
    connection_table: ConnectionTableWriter
    step_aside: Callable[[], None]

    def receive_timeout(self, deadline: float) -> float:
        """For how many seconds a client may be silent now; `deadline` is in CLOCK_MONOTONIC."""
        return min(deadline - time.monotonic(), self.limits.stale_timeout)

    def read_one_shot(self, client: ClientSocket, data: bytes, deadline: float) -> bytes:
        """Read to the end of a one-shot request, which begins with `data`.

        Raises Refusal when the request is too large or not complete in time, Draining.
        """
        scanner = ObjectScanner()
        pieces = [data]
        size = len(data)
        while not scanner.feed(data) and size <= self.limits.max_request_size:
            data = self._receive_more(client, deadline)
            if not data:
                break  # end of file: the parser says what is missing
            pieces.append(data)
            size += len(data)
        if size > self.limits.max_request_size:
            raise self._too_large(f"over {self.limits.max_request_size}")
        return b"".join(pieces)

    def frame_end(self, data: bytes | bytearray, at: int) -> int:
        """Where a framed request ends that begins at `at`; beyond `data` when it is incomplete.

        Raises Refusal when the request is too large.
        """
        begins = at + FRAME_HEADER.size
        if len(data) < begins:
            return begins + 1
        length = int.from_bytes(data[at:begins])
        if length > self.limits.max_request_size:
            raise self._too_large(f"{length}")
        return begins + length

    def read_frame(self, client: ClientSocket, data: bytes, deadline: float) -> bytes:
        """Read to the end of a framed request, which begins with `data`, or a little further.

        No bytes when the client has ended the connection. `deadline` is in CLOCK_MONOTONIC seconds;
        0.0: `read_timeout` from now. Raises Refusal, Draining.
        """
        deadline = deadline or time.monotonic() + self.limits.read_timeout
        buffer = bytearray(data)
        while self.frame_end(buffer, 0) > len(buffer):
            data = self._receive_more(client, deadline)
            if not data:
                return b""
            buffer += data
        return bytes(buffer)

    def _receive_more(self, client: ClientSocket, deadline: float) -> bytes:
        """More bytes of an incomplete request; none at the client's end of file.

        Raises Refusal when none come in time, Draining.
        """
        self.step_aside()
        self.connection_table.is_doing(client.entry, READING)
        client.quiet_since = time.monotonic_ns()
        try:
            data = client.receive(self.receive_timeout(deadline))
        except TimeoutError:
            raise self._too_slow(deadline) from None
        finally:
            client.quiet_since = 0
        if not data and client.stale:
            raise self._too_slow(deadline)
        if not data and client.input_may_have_ended:
            raise Draining
        self.connection_table.heard(client.entry, time.monotonic_ns())
        return data

    def _too_large(self, size: str) -> Refusal:
        limit = self.limits.max_request_size
        message = (
            f"Invalid request: {size} bytes; at most {limit} are allowed (limits.max_request_size)"
        )
        return Refusal("InvalidRequest", message)

    def _too_slow(self, deadline: float) -> Refusal:
        limits = self.limits
        problem = f"not complete after {limits.read_timeout:g} s (limits.read_timeout)"
        if time.monotonic() < deadline:
            silent = f"nothing came for {limits.stale_timeout:g} s (limits.stale_timeout)"
            problem = f"not complete, and {silent}"
        return Refusal("InvalidRequest", f"Invalid request: {problem}")
