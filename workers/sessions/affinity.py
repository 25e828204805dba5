"""Bringing a call to the worker that has its state.

A module of affinity "client" keeps what one client process left there, and all its calls reach one
worker. A module of affinity "module" keeps what all clients share, and all their calls reach one
worker; other modules have others. A worker that gets a call of another's hands the client over, see
`workers/handoff/message.py`.

Who owns what is decided once, under the gate's lock, and stands in the shared memory
(`ownership.py`). A call whose owner has died gets `SessionLost`, once for all that its client had
there; the next one finds a new owner.

Called from the threads that serve clients.
"""

import os
import time
from collections.abc import Callable

from cpanbridge.supervisor.memory.owners import BY_CONNECTION, ClientProcess
from cpanbridge.supervisor.system.start_time import start_time
from cpanbridge.supervisor.wording import explain_start
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.identity import has_connected
from cpanbridge.workers.client.spare_descriptors import spare
from cpanbridge.workers.client.transfer import Transfer
from cpanbridge.workers.modules.registry import FOR_CLIENT
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.requests.calls import Call
from cpanbridge.workers.sessions.dispatch import Dispatcher, not_run, patience, pause, too_late
from cpanbridge.workers.sessions.ownership import Ownership
from cpanbridge.workers.sessions.session import Session
from cpanbridge.workers.sessions.sessions import Sessions

RETRY_SECONDS = 1.0  # when to try again where all sessions are taken


class Affinity:
    """One worker's part in it."""

    def __init__(
        self,
        ownership: Ownership,
        sessions: Sessions,
        dispatcher: Dispatcher,
        stale_timeout: float,
    ) -> None:
        self._ownership = ownership
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._stale_timeout = stale_timeout

    def join(
        self, call: Call, client: ClientSocket, data: Callable[[], bytes], stop: int
    ) -> Session:
        """The client's session, for one call of a module that has an affinity.

        `Sessions.leave` must follow. `data` is what was read of the client, from this call on.
        Raises HandedOver when another worker runs it; Refusal (SessionLost, WorkerLost,
        RequestTimeout, Overloaded) when none does; Draining when the descriptor `stop` was readable
        first.
        """
        owned_as = call.target.owned_as
        assert owned_as is not None
        until = call.arrived + patience(call)
        # A client that was handed over, or returned, is not moved for the sake of even numbers.
        may_move = owned_as == FOR_CLIENT and not client.taken_over and client.transfer is None
        if client.transfer is not None:
            transfer, client.transfer = client.transfer, None
            until = transfer.until
            client.duplicated = True  # it may be in the queue still
            self._dispatcher.accept_returned(call, transfer, stop)
        while True:
            process = client.process or self._recognise(call, client)
            session = self._sessions.enter_for(process, owned_as)
            if session is not None:
                if session.expired:
                    self._end_expired(call, session)
                return session
            answer = self._ownership.find(process, owned_as, may_move=may_move)
            may_move = False
            if answer.lost:
                raise _session_lost(call, f"worker {answer.owner.slot} has ended")
            if answer.owner == self._ownership.me:
                session = self._begin(call, client, process, owned_as)
                if session is not None:
                    return session
                continue
            if time.monotonic() >= until:
                raise too_late(call, answer.owner)
            moving = self._dispatcher.moving(call, client, data(), input_may_have_ended=True)
            client.transfer = Transfer(moving, answer.owner, until, known=answer.known)
            self._dispatcher.send(client)
            pause(stop)

    # -- who the client is --

    def _recognise(self, call: Call, client: ClientSocket) -> ClientProcess:
        """The client; Refusal (Overloaded) when that cannot be told for now."""
        pid, uid, _ = client.credentials()
        session = self._sessions.of_process(pid, uid)
        try:
            if session is not None:
                start: int | None = session.process.start
            else:  # 0 is a process that this PID namespace has no number for
                start = spare.open(lambda: start_time(pid)) if pid > 0 else None
            if start is None or not spare.open(lambda: has_connected(client, start)):
                return self._by_connection(client)
        except OSError as error:
            raise _cannot_watch(call, error) from None
        client.process = ClientProcess(pid, start, uid)
        return client.process

    def _by_connection(self, client: ClientSocket) -> ClientProcess:
        client.process = ClientProcess(BY_CONNECTION, os.fstat(client.descriptor).st_ino)
        client.duplicated = True  # its session holds the socket as well, to see its end
        return client.process

    # -- a session here --

    def _begin(
        self, call: Call, client: ClientSocket, process: ClientProcess, owned_as: int
    ) -> Session | None:
        """Begin to keep a client's state; None when its owner is to be found anew."""
        try:
            session = self._sessions.enter(process, client.descriptor)
        except ProcessLookupError:
            # It has ended, and left the connection to a child, or does not wait for its reply.
            self._by_connection(client)
            return None
        except OSError as error:
            raise _cannot_watch(call, error) from None
        written = self._ownership.take(process, owned_as)
        if written:
            session.modules.add(owned_as)
            if session.over:  # its client has ended before the row was there to be taken out
                self._ownership.forget(process)
            return session
        self._sessions.leave(session)
        if written is None and not self._ownership.sweep():
            what = f"no session is left of {self._ownership.most} (limits.max_sessions)"
            raise _no_room(call, what)
        return None

    def _end_expired(self, call: Call, session: Session) -> None:
        self._sessions.leave(session)
        self._sessions.end(session)
        silence = self._stale_timeout
        raise _session_lost(call, f"nothing came for {silence:g} s (limits.stale_timeout)")


def _session_lost(call: Call, why: str) -> Refusal:
    return not_run(
        call,
        "SessionLost",
        f"What this client process had in module {call.request.module!r}, and in all others of "
        f"that worker, is lost: {why}",
    )


def _cannot_watch(call: Call, error: OSError) -> Refusal:
    return _no_room(call, f"this client's process cannot be watched: {explain_start(error)}")


def _no_room(call: Call, what: str) -> Refusal:
    refusal = not_run(call, "Overloaded", f"No room for another client's state: {what}")
    refusal.retry_after = RETRY_SECONDS
    return refusal
