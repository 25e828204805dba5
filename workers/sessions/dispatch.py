"""Sending a client to another worker, and judging one that was returned."""

import logging
import math
import select
import time

from cpanbridge.supervisor.memory.connection_table import WAITING, ConnectionTableWriter
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.supervisor.wording import explain
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import Draining
from cpanbridge.workers.client.transfer import MovingClient, ReturnReason, Transfer
from cpanbridge.workers.handoff.outgoing import Outgoing
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.requests.calls import Call

LOGGER = logging.getLogger("cpanbridge.worker")

AGAIN_MS = 50  # before a client is put in again that its owner had no descriptor for
COMPLAIN_SECONDS = 60.0


class HandedOver(Exception):
    """The client is another worker's now, or on its way there."""


class Dispatcher:
    """One worker's. Called from the threads that serve clients."""

    def __init__(
        self,
        shared: Shared,
        outgoing: Outgoing,
        connection_table: ConnectionTableWriter,
    ) -> None:
        self._shared = shared
        self._outgoing = outgoing
        self._connection_table = connection_table
        self._complained = -COMPLAIN_SECONDS

    def moving(
        self, call: Call, client: ClientSocket, data: bytes, *, input_may_have_ended: bool
    ) -> MovingClient:
        """What goes to another worker; `data` is what was read of the client, from the call on."""
        requests = self._connection_table.requests(client.entry)
        return MovingClient(
            *(client.descriptor, data, client.accepted_at, requests),
            *(call.arrived, call.ticket, input_may_have_ended),
        )

    def send(self, client: ClientSocket) -> None:
        """Put a client into another worker's queue, as `client.transfer` says.

        Raises HandedOver; returns when that cannot be now.
        """
        self._connection_table.is_doing(client.entry, WAITING)
        try:
            self._outgoing.put(client)
        except OSError as error:
            self._complain(error)
            client.transfer = None
        else:
            raise HandedOver

    def accept_returned(self, call: Call, transfer: Transfer, stop: int) -> None:
        """A client was returned to go on here: check whether its call may still run.

        Raises Refusal if not; Draining when the descriptor `stop` is readable.
        """
        refusal = self.why_not(call, transfer)
        if refusal is not None:
            raise refusal
        if self._shared.is_there(transfer.receiver):
            pause(stop)  # the owner had no descriptor left

    def why_not(self, call: Call, transfer: Transfer) -> Refusal | None:
        """What a client that was returned is to be told; None: its call may still run."""
        if transfer.may_stay:
            return None
        if self._is_late(transfer):
            return too_late(call, transfer.receiver)
        if self._is_lost(transfer):
            return _worker_lost(call, transfer.receiver)
        return None

    def may_still_run(self, transfer: Transfer) -> bool:
        """Whether `why_not` returns None, whatever the call is."""
        return transfer.may_stay or not (self._is_late(transfer) or self._is_lost(transfer))

    @staticmethod
    def _is_late(transfer: Transfer) -> bool:
        return transfer.return_reason is ReturnReason.TOO_LATE or time.monotonic() >= transfer.until

    def _is_lost(self, transfer: Transfer) -> bool:
        return transfer.known and not self._shared.is_there(transfer.receiver)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            LOGGER.error("Cannot hand clients over for now: %s", explain(error))


def patience(call: Call) -> float:
    """For how many seconds from its arrival a call may wait for its owner."""
    return min(call.target.request_timeout or math.inf, call.request.timeout or math.inf)


def pause(stop: int) -> None:
    """Wait a little. Raises Draining when the descriptor `stop` is readable."""
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    if poll.poll(AGAIN_MS):
        raise Draining


def not_run(call: Call, kind: str, message: str) -> Refusal:
    """The refusal of a call that has not run."""
    return Refusal(kind, f"{message}; the call was not run", call.request.request_id)


def too_late(call: Call, owner: Owner) -> Refusal:
    """The refusal of a call whose owner has not taken it in time."""
    message = (
        f"Worker {owner.slot}, which has the state of module {call.request.module!r}, "
        "had no thread free in time"
    )
    return not_run(call, "RequestTimeout", message)


def _worker_lost(call: Call, owner: Owner) -> Refusal:
    message = (
        f"Worker {owner.slot}, which had this client's state of module {call.request.module!r}, "
        "ended while the call was on its way there"
    )
    return not_run(call, "WorkerLost", message)
