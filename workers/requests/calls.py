"""From a request to its reply: find its function, wait for admission, run it, record it.

Called from the threads that serve clients. Nothing here receives from a client or sends to it.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Gate, Obstacle
from cpanbridge.supervisor.memory.connection_table import WAITING, ConnectionTableWriter
from cpanbridge.supervisor.memory.fields import CONCURRENCY, CONNECTIONS, OVERLOAD, RATE
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import Draining
from cpanbridge.workers.modules import registry
from cpanbridge.workers.modules.registry import Registry, Target
from cpanbridge.workers.protocol import framing, replies
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request, decode_if_complete, decode_request
from cpanbridge.workers.requests import security_log
from cpanbridge.workers.requests.stats import StatisticsWriter
from cpanbridge.workers.requests.timeouts import AnsweredError, CallTimeouts, Running

LOGGER = logging.getLogger("cpanbridge.worker")


class Call(msgspec.Struct):
    """A request together with the function that it names."""

    request: Request
    target: Target
    arrived: float  # CLOCK_MONOTONIC seconds


_TRY_AGAIN_SECONDS = 1.0

_OBSTACLES = {
    OVERLOAD: "the daemon uses more memory or CPU than it may",
    CONNECTIONS: "all connections are taken (limits.max_connections)",
    CONCURRENCY: "all requests that may run are running (limits.max_concurrent_requests)",
    RATE: "this minute's requests are used up (limits.max_requests_per_minute)",
}


class Overloaded(Refusal):
    """There is no room, and with `overload = "reject"` clients do not wait for it."""

    def __init__(self, obstacle: Obstacle, request_id: str | None) -> None:
        self.reason = obstacle.reason
        self.retry_after: float = round(obstacle.retry_after, 3)
        message = (
            f"No room: {_OBSTACLES[obstacle.reason]}; the call was not run, "
            f"try again in {self.retry_after:g} s"
        )
        super().__init__("Overloaded", message, request_id)


class DisconnectedError(OSError):
    """The client has disconnected before its request was run."""


class Calls:
    """Runs the requests of one worker's connections."""

    def __init__(
        self,
        settings: Settings,
        worker: int,
        shared: Shared,
        gate: Gate,
        registry: Registry,
        timeouts: CallTimeouts,
    ) -> None:
        self._limits = settings.limits
        self._debug = settings.debug
        self._rejects = settings.overload == "reject"
        self._worker = worker
        self._shared = shared
        self._gate = gate
        self._registry = registry
        self._timeouts = timeouts
        self._statistics = StatisticsWriter(shared, worker)
        self._security = security_log.SecurityLog(worker)
        self._pid = os.getpid()
        self.connection_table = ConnectionTableWriter(shared.statistics[worker].connection_table)

    def prepare(self, data: bytes, arrived: float | None) -> Call | None:
        """The call in a client's first bytes, or in those of a framed client's next request.

        `arrived` is when they did (CLOCK_MONOTONIC seconds), if another worker has read them. None
        when the request is incomplete or cannot run: `resolve` decodes it again, to say why.
        """
        if not data:
            return None
        framed = framing.is_framed(data)
        message = framing.whole_frame(data) if framed else data
        if message is None or len(message) > self._limits.max_request_size:
            return None
        return self._find_if_valid(message, arrived)

    def resolve(self, data: bytes) -> Call:
        """The call in a complete request's bytes. Raises Refusal that says what is wrong."""
        return self._find_if_valid(data, None) or self._find(decode_request(data, self._limits))

    def _find_if_valid(self, data: bytes, arrived: float | None) -> Call | None:
        try:
            request = decode_if_complete(data, self._limits)
            return None if request is None else self._find(request, arrived)
        except Refusal:
            return None

    def _find(self, request: Request, arrived: float | None = None) -> Call:
        return Call(request, self._registry.find(request), arrived or time.monotonic())

    def admit(
        self, call: Call, client: ClientSocket, stop: int, step_aside: Callable[[], None]
    ) -> None:
        """Wait until a request may run, and count it as running.

        `step_aside` is called before it waits. Raises, and the request is not run: Draining when
        the descriptor `stop` is readable first; Overloaded, with `overload = "reject"`, when there
        is no room now; Refusal (RequestTimeout) when the request's own timeout is over;
        DisconnectedError.
        """
        if client.has_hung_up():
            raise DisconnectedError
        gate = self._gate
        outcome = gate.attempt(gate.admit, connection=False)
        if outcome is True:
            return
        if self._rejects and isinstance(outcome, Obstacle):
            raise Overloaded(outcome, call.request.request_id)
        self.connection_table.is_doing(client.entry, WAITING)
        step_aside()
        if not gate.wait_and_take(gate.admit, stop, connection=False):
            raise Draining
        late = call.request.timeout is not None and self._left(call) <= 0
        if late or client.has_hung_up():
            gate.finished(succeeded=False)
            if not late:
                raise DisconnectedError
            message = "There was no room within the request's timeout; the call was not run"
            raise Refusal("RequestTimeout", message, call.request.request_id)

    @staticmethod
    def _left(call: Call) -> float:
        """Seconds until the request's own timeout is over; it must have one."""
        return (call.request.timeout or 0.0) - (time.monotonic() - call.arrived)

    def _watch_if_limited(self, call: Call, function: int, client: ClientSocket) -> Running | None:
        """Have the call watched when the module or the request sets a timeout: the shorter one."""
        limit = seconds = call.target.request_timeout
        if call.request.timeout is not None:
            left = max(0.001, self._left(call))
            if not limit or left < limit:
                limit, seconds = call.request.timeout, left
        return self._timeouts.begin(call.request, function, client, limit, seconds)

    def run(self, call: Call, client: ClientSocket) -> bytes:
        """Run an admitted request and return the reply. Its room is given back in any case.

        Raises AnsweredError when its client was answered meanwhile, because it took too long.
        """
        request, target = call.request, call.target
        function = target.number
        if function < 0:
            function = self._number(call)
        self.connection_table.runs(client.entry)
        watched = self._watch_if_limited(call, function, client)
        started = time.monotonic_ns()
        problem: str | None = "the daemon's own fault"
        try:
            outcome = registry.call(target, request, client)
            if os.getpid() != self._pid:
                # The function has forked and returned in the child. The client is the parent's.
                os._exit(0)
            if outcome.error is not None:
                problem = replies.message_of(outcome.error) or type(outcome.error).__name__
                return self._failure(request, outcome.error, problem)
            duration_ms = (time.monotonic_ns() - started) / 1e6
            reply = replies.encode_success(request, outcome.result, duration_ms, self._worker)
            problem = None
            return reply
        except Refusal as refusal:
            problem = refusal.message
            self._note_if_event(refusal, client)
            return replies.encode_failure(refusal.message, refusal.kind, request.request_id)
        finally:
            ended = time.monotonic_ns()
            answered = watched is not None and not self._timeouts.end(watched)
            if answered:
                problem = "it took longer than its request_timeout"
            duration_ns = ended - started
            if problem is not None:
                self._statistics.error(function, duration_ns, problem)
            self._statistics.ran(function, problem is None, duration_ns, ended)
            if not answered:  # else CallTimeouts has given its room back
                self._gate.finished(problem is None)
            self.connection_table.ran(client.entry, ended)
            target.took(duration_ns)
            if answered:
                raise AnsweredError

    def _number(self, call: Call) -> int:
        """The function's index in the table of names. Called for its first call in this worker."""
        with self._shared.lock:
            number = self._shared.names.number_of(f"{call.request.module}.{call.request.function}")
        call.target.number = number
        return number

    def _failure(self, request: Request, error: BaseException, problem: str) -> bytes:
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
        text = f"Error in {request.module}.{request.function}: {problem}"
        kind = type(error).__name__
        return replies.encode_failure(text, kind, request.request_id, traceback=trace)

    def refuse(self, refusal: Refusal, client: ClientSocket) -> bytes:
        """Count a request that is not run, and return the reply that says why."""
        self._statistics.refused()
        self._note_if_event(refusal, client)
        if isinstance(refusal, Overloaded):
            self._statistics.overloaded(refusal.reason)
        return replies.encode_failure(
            refusal.message, refusal.kind, refusal.request_id, retry_after=refusal.retry_after
        )

    def reject(self, obstacle: Obstacle, request_id: str | None) -> bytes:
        """The same for a client that is not accepted as a connection."""
        overloaded = Overloaded(obstacle, request_id)
        self._statistics.refused()
        self._statistics.rejected()
        self._statistics.overloaded(overloaded.reason)
        return replies.encode_failure(
            overloaded.message, overloaded.kind, request_id, retry_after=overloaded.retry_after
        )

    def not_run(self, *, daemon_ends: bool) -> bytes:
        """The reply to a request that is not run because the daemon ends.

        Without `daemon_ends`: because its worker exits, and there was no room for it in time.
        """
        self._statistics.refused()
        if daemon_ends:
            message = "The daemon is shutting down; the call was not run"
            return replies.encode_failure(message, "ShuttingDown", None)
        message = "No room: the call has waited for as long as its worker had; it was not run"
        return replies.encode_failure(message, "Overloaded", None, retry_after=_TRY_AGAIN_SECONDS)

    def _note_if_event(self, refusal: Refusal, client: ClientSocket) -> None:
        event = self._security.event(refusal, client)
        if event is not None:
            self._statistics.event(event)
