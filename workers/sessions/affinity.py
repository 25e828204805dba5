"""Which worker runs a call: the one that has the state.

A module of affinity "client" keeps what one client process left there, and all its calls reach one
worker. A module of affinity "module" keeps what all clients share, and all their calls reach one
worker; other modules have others. Where a worker gets a call that another one owns, it hands the
client over, see `handover.py`.

Who owns what is decided once, under the gate's lock, and stands in the shared memory
(`supervisor/owners.py`): a row for each client process, or for each client process and module of
affinity "module". A row is written by the owner itself, once it watches the client's end, so none
is ever left to nobody. What clients share has a row of its own, that says where new clients go:
never to a worker that is to leave, so its clients become fewer until it can.

A call whose owner has died gets `SessionLost`, once for all that its client had there; the next one
finds a new owner.

Called from the threads that serve clients.
"""

import logging
import math
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.connection_table import WAITING, ConnectionTableWriter
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import BY_CONNECTION, ClientProcess, Owner
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import Draining
from cpanbridge.workers.client.identity import Identities, start_time
from cpanbridge.workers.client.transfer import Fate, MovingClient, Transfer
from cpanbridge.workers.handoff.outgoing import Outgoing
from cpanbridge.workers.modules.registry import FOR_CLIENT
from cpanbridge.workers.protocol.messages import Refusal
from cpanbridge.workers.requests.calls import Call
from cpanbridge.workers.sessions.sessions import Session, Sessions

LOGGER = logging.getLogger("cpanbridge.worker")

AGAIN_MS = 50  # before a client is put in again that its owner had no descriptor for
COMPLAIN_SECONDS = 60.0
RETRY_SECONDS = 1.0  # when to try again where all sessions are taken
_MORE = 2  # sessions than another worker has, and who comes next goes there


class HandedOver(Exception):
    """The client is another worker's now."""


class _Answer(NamedTuple):
    """Where a call is to run."""

    owner: Owner
    known: bool  # the client has state there, or had


class Affinity:
    """One worker's part in it. `taken` ends what it has of a client that another one has taken."""

    def __init__(
        self,
        shared: Shared,
        slot: int,
        wakeups: Sequence[Wakeups],
        limits: Limits,
        connection_table: ConnectionTableWriter,
        taken: Callable[[ClientSocket], None],
    ) -> None:
        self._shared = shared
        self._slots = shared.slots
        self._wakeups = wakeups
        self._limits = limits
        self._connection_table = connection_table
        self._me = shared.owner(slot)
        self._complained = -COMPLAIN_SECONDS
        self._identities = Identities()
        self.sessions = Sessions(shared.slots[slot], limits.stale_timeout, self._forget)
        self.outgoing = Outgoing(shared, slot, wakeups, taken)

    def join(
        self, call: Call, client: ClientSocket, data: Callable[[], bytes], stop: int
    ) -> Session:
        """The client's session, for one call of a module that has an affinity; `leave` must follow.

        `data` is what was read of the client, from this call on. Raises HandedOver when another
        worker runs it; Refusal (SessionLost, WorkerLost, RequestTimeout, Overloaded) when nobody
        does; Draining when the descriptor `stop` was readable first.
        """
        owned_as = call.target.owned_as
        assert owned_as is not None
        until = call.arrived + self._patience(call)
        # Who was sent here, or has come back, is not sent on for that.
        may_be_sent_on = (
            owned_as == FOR_CLIENT and not client.taken_over and client.transfer is None
        )
        if client.transfer is not None:
            transfer, client.transfer = client.transfer, None
            until = transfer.until
            client.lent = True  # it may be in the postbox still
            self._look_after(call, transfer, stop)
        while True:
            process = client.process or self._recognise(client)
            session = self.sessions.enter_for(process, owned_as)
            if session is not None:
                if session.expired:
                    self._say_expired(call, session)
                return session
            with self._shared.lock:
                answer = self._find(process, owned_as)
                lost = answer.known and not self._shared.is_there(answer.owner)
                if lost:
                    self._shared.sessions.remove(process, answer.owner)
                elif may_be_sent_on and answer == _Answer(self._me, known=False):
                    answer = _Answer(self._less_burdened() or self._me, known=False)
            may_be_sent_on = False
            if lost:
                raise _session_lost(call, f"worker {answer.owner.slot} has ended")
            if answer.owner == self._me:
                session = self._begin(call, client, process, owned_as)
                if session is not None:
                    return session
            else:
                if time.monotonic() >= until:
                    raise _too_late(call, answer.owner)
                moving = self._moving(call, client, data(), input_may_have_ended=True)
                client.transfer = Transfer(moving, answer.owner, until, known=answer.known)
                self.send(client)
                _pause(stop)

    def _patience(self, call: Call) -> float:
        """For how many seconds a call may wait for its owner."""
        return min(call.target.request_timeout or math.inf, call.request.timeout or math.inf)

    # -- who the client is --

    def _recognise(self, client: ClientSocket) -> ClientProcess:
        pid = client.credentials().pid
        session = self.sessions.of_process(pid)
        if session is not None:
            client.process = session.process
            return session.process
        # 0 is a process that this PID namespace has no number for.
        process = self._identities.process(pid) if pid > 0 else None
        if process is None:
            return self._by_connection(client)
        client.process = process
        return process

    def _by_connection(self, client: ClientSocket) -> ClientProcess:
        client.process = ClientProcess(BY_CONNECTION, os.fstat(client.descriptor).st_ino)
        client.lent = True  # its session holds the socket as well, to see its end
        return client.process

    # -- who the owner is; called under the gate's lock --

    def _find(self, process: ClientProcess, owned_as: int) -> _Answer:
        owner = self._shared.sessions.find(process, owned_as)
        if owner is not None:
            return _Answer(owner, known=True)
        if owned_as == FOR_CLIENT:
            return _Answer(self._owner_for_client(), known=False)
        return _Answer(self._owner_for_module(owned_as), known=False)

    def _owner_for_client(self) -> Owner:
        if self._slots[self._me.slot].is_staying:
            return self._me
        return self._least(self._sessions_of) or self._me

    def _less_burdened(self) -> Owner | None:
        """The worker with the fewest sessions, if this one has too many; else None.

        Who is let in where is chance, and of an idle daemon's workers always the same one lets in.
        """
        least = self._least(self._sessions_of)
        if least is None or self._sessions_of(self._me) < self._sessions_of(least) + _MORE:
            return None
        return least

    def _sessions_of(self, owner: Owner) -> int:
        return int(self._slots[owner.slot].sessions)

    def _owner_for_module(self, module: int) -> Owner:
        table = self._shared.module_owners
        key = ClientProcess(0, module)
        owner = table.find(key, module)
        if owner is not None:
            if self._shared.is_there(owner) and self._slots[owner.slot].serves:
                return owner
            table.remove(key, owner)
        modules = [each for _, each in table.all()]
        chosen = self._least(modules.count)
        if chosen is None:
            return self._me  # nobody serves: the last one of those that leave
        if not table.insert(key, module, chosen):
            # So many names come only of many reloads: what is dead can go.
            for each, old in list(table.all()):
                if not self._shared.is_there(old):
                    table.remove(each, old)
            table.insert(key, module, chosen)
        return chosen

    def _least(self, burden: Callable[[Owner], int]) -> Owner | None:
        slots = list(enumerate(self._shared.used_slots))
        serving = [number for number, slot in slots if slot.serves]
        # None does when a reload has just told the old ones to leave, and the new ones are about to
        # say that they serve.
        staying = [number for number, slot in slots if slot.is_staying]
        return min(map(self._shared.owner, staying or serving), key=burden, default=None)

    # -- when it is this worker --

    def _begin(
        self, call: Call, client: ClientSocket, process: ClientProcess, owned_as: int
    ) -> Session | None:
        """Take a client's state up; None when the answer has changed, so look again."""
        try:
            session = self.sessions.enter(process, client.descriptor)
        except ProcessLookupError:
            # It has ended, and left the connection to a child, or does not wait for its reply.
            self._by_connection(client)
            return None
        except OSError as error:
            raise _no_room(
                call, f"this client's process cannot be watched: {error.strerror}"
            ) from None
        table = self._shared.sessions
        with self._shared.lock:
            answer = self._find(process, owned_as)
            mine = answer.owner == self._me
            written = mine and (answer.known or table.insert(process, owned_as, self._me))
        if written:
            session.modules.add(owned_as)
            if session.over:  # its client has ended before the row was there to be taken out
                self._forget(process)
            return session
        self.sessions.leave(session)
        if mine and not self._sweep():
            what = f"all {table.rows} sessions are taken (limits.max_sessions)"
            raise _no_room(call, what)
        return None

    def _sweep(self) -> bool:
        """Take out the rows of clients that have ended after their owner had; whether there are."""
        dead = {
            (process, owner)
            for process, owner in self._shared.sessions.all()
            if not self._shared.is_there(owner)
            and (process.pid == BY_CONNECTION or start_time(process.pid) != process.start)
        }
        with self._shared.lock:
            for process, owner in dead:
                self._shared.sessions.remove(process, owner)
        return bool(dead)

    def _forget(self, process: ClientProcess) -> None:
        with self._shared.lock:
            self._shared.sessions.remove(process, self._me)

    def _say_expired(self, call: Call, session: Session) -> None:
        self.sessions.leave(session)
        self.sessions.end(session)
        silence = self._limits.stale_timeout
        raise _session_lost(call, f"nothing came for {silence:g} s (limits.stale_timeout)")

    # -- when it is another one --

    def goes_on(
        self, call: Call, client: ClientSocket, data: bytes, to: Owner, seconds: float
    ) -> None:
        """A client is to go to another worker, where its call may run as well as here.

        From now on nobody may dismiss it; `send` must follow. Where it is not taken in `seconds`,
        it comes back, and `stays` must be told.
        """
        until = min(time.monotonic() + seconds, call.arrived + self._patience(call))
        moving = self._moving(call, client, data, input_may_have_ended=client.input_had_ended)
        client.transfer = Transfer(moving, to, until, may_stay=True)

    def stays(self, client: ClientSocket) -> None:
        """A client that was passed on has come back."""
        assert client.transfer is not None
        self._empty_if_ended(client.transfer.owner)
        client.transfer = None
        client.lent = True  # it may be in the postbox still

    def _moving(
        self, call: Call, client: ClientSocket, data: bytes, *, input_may_have_ended: bool
    ) -> MovingClient:
        history = self._connection_table.history(client.entry)
        return MovingClient(client.descriptor, data, *history, call.arrived, input_may_have_ended)

    def send(self, client: ClientSocket) -> None:
        """Put a client into another worker's postbox, as `peer.journey` says.

        Raises HandedOver; returns when that cannot be now.
        """
        self._connection_table.is_doing(client.entry, WAITING)
        try:
            self.outgoing.put(client)
        except OSError as error:
            self._complain(error)
            client.transfer = None
        else:
            raise HandedOver

    def _look_after(self, call: Call, transfer: Transfer, stop: int) -> None:
        """A client has come back: see whether it is worth while to go on with it."""
        refusal = self.why_not(call, transfer)
        if refusal is None and self._shared.is_there(transfer.owner):
            _pause(stop)  # it had no descriptor left
        else:
            self._empty_if_ended(transfer.owner)
        if refusal is not None:
            raise refusal

    def _empty_if_ended(self, owner: Owner) -> None:
        if not self._slots[owner.slot].pid:
            handoff_sockets.throw_away(self._wakeups[owner.slot].take)

    def why_not(self, call: Call, transfer: Transfer) -> Refusal | None:
        """What a client that has come back is to be told; None: its call may run yet."""
        if transfer.may_stay:
            return None
        if self._is_late(transfer):
            return _too_late(call, transfer.owner)
        if self._is_lost(transfer):
            return _worker_lost(call, transfer.owner)
        return None

    def may_run_yet(self, transfer: Transfer) -> bool:
        """Whether `why_not` has nothing to say, whatever the call is."""
        return transfer.may_stay or not (self._is_late(transfer) or self._is_lost(transfer))

    @staticmethod
    def _is_late(transfer: Transfer) -> bool:
        return transfer.fate is Fate.TOO_LATE or time.monotonic() >= transfer.until

    def _is_lost(self, transfer: Transfer) -> bool:
        return transfer.known and not self._shared.is_there(transfer.owner)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            LOGGER.error("Cannot hand clients over for now: %s", error.strerror)


def _pause(stop: int) -> None:
    """Wait a little. Raises Draining when the descriptor `stop` is readable."""
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    if poll.poll(AGAIN_MS):
        raise Draining


def _refusal(call: Call, kind: str, message: str) -> Refusal:
    return Refusal(kind, f"{message}; the call was not run", call.request.request_id)


def _session_lost(call: Call, why: str) -> Refusal:
    return _refusal(
        call,
        "SessionLost",
        f"What this client process had in module {call.request.module!r}, and in all others of "
        f"that worker, is lost: {why}",
    )


def _worker_lost(call: Call, owner: Owner) -> Refusal:
    message = (
        f"Worker {owner.slot}, which had this client's state of module {call.request.module!r}, "
        "ended while the call was on its way there"
    )
    return _refusal(call, "WorkerLost", message)


def _too_late(call: Call, owner: Owner) -> Refusal:
    message = (
        f"Worker {owner.slot}, which has the state of module {call.request.module!r}, "
        "had no thread free in time"
    )
    return _refusal(call, "RequestTimeout", message)


def _no_room(call: Call, what: str) -> Refusal:
    refusal = _refusal(call, "Overloaded", f"No room for another client's state: {what}")
    refusal.retry_after = RETRY_SECONDS
    return refusal
