"""From a request to its reply: find its function, wait for admission, run it, record it.

Called from the threads that serve clients. Nothing here receives from a client or sends to it.
"""

import logging
import os
import time
import traceback
from dataclasses import dataclass

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory.connection_table import ConnectionTableWriter
from cpanbridge.supervisor.memory.fields import (
    ADMITTED,
    CONCURRENCY,
    CONNECTIONS,
    OVERLOAD,
    RATE,
    REASON_OF,
    THREADS,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_THREAD,
    WAITS_FOR_TURN,
)
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.accept.admission import Admission, MustWait
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules import registry
from cpanbridge.workers.modules.registry import Registry, Target
from cpanbridge.workers.protocol import framing, replies, results
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request, decode_if_complete, decode_request
from cpanbridge.workers.requests.stats import SecurityLog, StatisticsWriter
from cpanbridge.workers.requests.timeouts import CallTimeouts

LOGGER = logging.getLogger("cpanbridge.worker")


class Call(msgspec.Struct):
    """A request together with the function that it names."""

    request: Request
    target: Target
    arrived: float  # CLOCK_MONOTONIC seconds
    ticket: int = 0  # with which it has waited at the gate; 0: it has not

    @property
    def is_movable(self) -> bool:
        """Whether any worker may run it."""
        return self.target.owned_as is None


_TRY_AGAIN_SECONDS = 1.0

_OBSTACLES = {
    OVERLOAD: "the daemon uses more memory or CPU than it may",
    CONNECTIONS: "all connections are taken (limits.max_connections)",
    CONCURRENCY: "all requests that may run are running (limits.max_concurrent_requests)",
    RATE: "this minute's requests are used up (limits.max_requests_per_minute)",
}
_WAITED_FOR = {
    OVERLOAD: "the daemon to use less memory or CPU (limits.max_memory_mb, limits.max_cpu_percent)",
    CONCURRENCY: "limits.max_concurrent_requests",
    RATE: "limits.max_requests_per_minute",
    THREADS: "a thread of its worker (threads)",
    None: "its turn",
}


@dataclass(eq=False)
class Calls:
    """Runs the requests of one worker's connections."""

    settings: Settings
    shared: Shared
    admission: Admission[Call]
    registry: Registry
    timeouts: CallTimeouts
    statistics: StatisticsWriter

    def __post_init__(self) -> None:
        self.worker = self.timeouts.worker
        self._gate = self.admission.gate
        statistics = self.shared.statistics[self.worker]
        self.connection_table = ConnectionTableWriter(statistics.connection_table)
        self._security_log = SecurityLog(self.worker, self.statistics)
        self._pid = os.getpid()

    def prepare(self, data: bytes, arrived: float | None, ticket: int) -> Call | None:
        """The call in a client's first bytes, or in those of a framed client's next request.

        `arrived` is when they did (CLOCK_MONOTONIC seconds), if another worker has read them, and
        `ticket` that with which the request has waited there. None when the request is incomplete
        or cannot run: `resolve` decodes it again, to say why.
        """
        if not data:
            return None
        message = framing.whole_frame(data) if framing.is_framed(data) else data
        if message is None or len(message) > self.settings.limits.max_request_size:
            return None
        call = self._find_if_valid(message, arrived)
        if call is not None:
            call.ticket = ticket
        return call

    def resolve(self, data: bytes) -> Call:
        """The call in a complete request's bytes. Raises Refusal that says what is wrong."""
        call = self._find_if_valid(data, None)
        return call or self._find(decode_request(data, self.settings.limits), None)

    def _find_if_valid(self, data: bytes, arrived: float | None) -> Call | None:
        try:
            request = decode_if_complete(data, self.settings.limits)
            return None if request is None else self._find(request, arrived)
        except Refusal:
            return None

    def _find(self, request: Request, arrived: float | None) -> Call:
        return Call(request, self.registry.find(request), arrived or time.monotonic())

    def admit(self, call: Call, client: ClientSocket) -> None:
        """Count a request as running, if it may run now.

        Raises, and the request is not run or charged: MustWait when there is no room for it;
        Refusal (RequestTimeout) when the request's own timeout is over, or with `overload =
        "reject"` (Overloaded) when there is no room; ConnectionResetError when the client has
        disconnected.
        """
        if syscalls.has_hung_up(client.descriptor):
            raise ConnectionResetError
        if call.request.timeout is not None and _time_left(call) <= 0:
            raise self._too_late(call)
        code = self.admission.admit(call.ticket) if call.ticket else self._gate.admit()
        if code == ADMITTED:
            return
        waits = self.settings.overload == "wait" or code in (WAITS_FOR_THREAD, WAITS_FOR_TURN)
        if waits or call.ticket:
            raise MustWait(code)
        raise self._overloaded(code, call.request.request_id)

    def ping(self, call: Call, client: ClientSocket) -> bytes:
        """The reply to `test.ping`, which asks for no more than whether the daemon lives."""
        started = time.monotonic_ns()
        self.statistics.pinged()
        result, error = registry.call(call.target, call.request, client)
        if error is not None:
            return self._failure(call.request, error, str(error))
        ended = time.monotonic_ns()
        self.connection_table.ran(client.entry, ended)
        return replies.encode_success(call.request, result, (ended - started) / 1e6, self.worker)

    def _too_late(self, call: Call) -> Refusal:
        """The refusal of a call whose own timeout was over before there was room for it."""
        waited = time.monotonic() - call.arrived
        reason = _WAITED_FOR[self.admission.reason if call.ticket else None]
        message = f"The call was not run: it waited {waited:.1f} s for {reason}"
        return Refusal("RequestTimeout", message, call.request.request_id)

    def run(self, call: Call, client: ClientSocket) -> bytes:
        """Run an admitted request and return the reply. Its room is given back in any case.

        Raises ConnectionAbortedError when `CallTimeouts` has answered its client meanwhile: that
        must receive nothing more.
        """
        request, target = call.request, call.target
        function = target.number
        if function < 0:  # its first call in this worker
            name = f"{request.module}.{request.function}"
            function = target.number = self.shared.names.number_of(name)
        pid = self._pid_of(client, target)
        self.connection_table.runs(client.entry, function, pid, request.perl_caller)
        # Watched if the module or the request sets a timeout: the shorter one.
        limit = seconds = target.request_timeout
        if request.timeout is not None:
            left = max(0.001, _time_left(call))
            if not limit or left < limit:
                limit, seconds = request.timeout, left
        watched = self.timeouts.begin(request, function, client, limit, seconds)
        started = time.monotonic_ns()
        problem: str | None = "the daemon's own fault"
        try:
            result, error = registry.call(target, request, client)
            if os.getpid() != self._pid:
                # The function has forked and returned in the child. The client is the parent's.
                os._exit(0)
            if error is not None:
                problem = results.message_of(error) or type(error).__name__
                return self._failure(request, error, problem)
            duration_ms = (time.monotonic_ns() - started) / 1e6
            reply = replies.encode_success(
                request, result, duration_ms, self.worker, lenient=target.lenient
            )
            problem = None
            return reply
        except Refusal as refusal:
            problem = refusal.message
            self._security_log.record(refusal, client)
            return replies.encode_failure(refusal)
        finally:
            ended = time.monotonic_ns()
            answered = watched is not None and not self.timeouts.end(watched)
            if answered:
                problem = "it took longer than its request_timeout"
            duration_ns = ended - started
            if problem is not None:
                self.statistics.error(function, duration_ns, problem)
            self.statistics.ran(function, problem is None, duration_ns, ended)
            if not answered:  # else CallTimeouts has given its room back
                self._gate.release_request(problem is None)
            self.connection_table.ran(client.entry, ended)
            target.took(duration_ns)
            if answered:
                raise ConnectionAbortedError

    @staticmethod
    def _pid_of(client: ClientSocket, target: Target) -> int:
        """The client's pid; 0 where it is not worth asking for: a quick call would be no more."""
        if client.process is not None:
            return max(0, client.process.pid)
        return 0 if target.is_quick else max(0, client.credentials().pid)

    def _failure(self, request: Request, error: BaseException, problem: str) -> bytes:
        trace = None
        if self.settings.debug:
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
        refusal = Refusal(type(error).__name__, text, request.request_id)
        return replies.encode_failure(refusal, trace)

    def refuse(self, refusal: Refusal, client: ClientSocket) -> bytes:
        """Count a request that is not run, and return the reply that says why."""
        self._security_log.record(refusal, client)
        return self._refused(refusal)

    def reject(self, request_id: str | None) -> bytes:
        """The same for a client that is not accepted, because all connections are taken."""
        self.statistics.rejected()
        return self._refused(self._overloaded(WAITS_FOR_CONNECTION, request_id))

    def not_run(self, *, daemon_ends: bool) -> bytes:
        """The same for a request that is not run because the daemon ends.

        Without `daemon_ends`: because its worker exits, and there was no room for it in time.
        """
        if daemon_ends:
            message = "The daemon is shutting down; the call was not run"
            return self._refused(Refusal("ShuttingDown", message))
        message = "No room: the call has waited for as long as its worker had; it was not run"
        refusal = Refusal("Overloaded", message)
        refusal.retry_after = _TRY_AGAIN_SECONDS
        return self._refused(refusal)

    def _overloaded(self, waits_for: int, request_id: str | None) -> Refusal:
        """There is no room, and with `overload = "reject"` clients do not wait for it."""
        reason = REASON_OF[waits_for]
        retry_after = round(self.admission.retry_after(waits_for), 3)
        message = (
            f"No room: {_OBSTACLES[reason]}; the call was not run, try again in {retry_after:g} s"
        )
        refusal = Refusal("Overloaded", message, request_id)
        refusal.reason, refusal.retry_after = reason, retry_after
        return refusal

    def _refused(self, refusal: Refusal) -> bytes:
        self.statistics.refused()
        if refusal.reason is not None:
            self.statistics.overloaded(refusal.reason)
        return replies.encode_failure(refusal)


def _time_left(call: Call) -> float:
    """Seconds until the request's own timeout is over; it must have one."""
    assert call.request.timeout is not None
    return call.request.timeout - (time.monotonic() - call.arrived)
