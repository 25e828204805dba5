"""How a connection ends: closed, handed over, or told that nothing further is run.

What is said from the main thread is sent without waiting for the client to read it, but for
`end_leftover`, which waits a little for each.
"""

import logging
import time
from dataclasses import dataclass

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.wakeups import wake
from cpanbridge.workers.accept.ready_clients import Arrival
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import ConnectionDrainer
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.handoff.outgoing import Outgoing
from cpanbridge.workers.protocol.framing import NO_MORE_REQUESTS, is_framed, to_frame
from cpanbridge.workers.protocol.replies import to_ascii
from cpanbridge.workers.requests.calls import Call, Calls
from cpanbridge.workers.sessions.dispatch import Dispatcher

LOGGER = logging.getLogger("cpanbridge.worker")

LEFTOVER_SECONDS = 0.2


@dataclass(eq=False)
class Endings:
    """One worker's. Called in the thread that serves the client, but for what says otherwise."""

    gate: Gate
    calls: Calls
    drainer: ConnectionDrainer
    keep_alive: KeepAlive
    outgoing: Outgoing
    dispatcher: Dispatcher

    def close(self, client: ClientSocket) -> None:
        """End a connection, and give its room back."""
        self.calls.connection_table.leave(client.entry)
        try:
            if client.framed:
                self.drainer.remove(client)
                self.keep_alive.forget(client)
            client.close()
        except OSError:
            LOGGER.exception("A module has closed a client's socket")
        finally:
            if not client.released:
                self.gate.release_connection()
            self.drainer.has_left()

    def not_run(self) -> bytes:
        """The reply to a request that is not run, because the worker exits."""
        return self.calls.not_run(daemon_ends=self.drainer.daemon_ends)

    def say_shutting_down(self, client: ClientSocket, seconds: float) -> None:
        """Answer a client of which nothing was read yet, in the form that it speaks."""
        first = client.receive(LEFTOVER_SECONDS)
        if first and is_framed(first):
            client.send(NO_MORE_REQUESTS, seconds)
        elif first:
            client.send(to_ascii(self.not_run()), seconds)
        client.linger(LEFTOVER_SECONDS)

    # -- called in the main thread --

    def answer_returned(self) -> None:
        """Answer clients that were returned and whose calls will not run.

        Called when no thread leads, because all serve: such a client would wait until one is free,
        however soon its own time is over.
        """
        waiting = []
        while (client := self.outgoing.next_returned()) is not None:
            if not self._was_refused(client):
                waiting.append(client)
        for client in waiting:
            self.outgoing.return_client(client)

    def _was_refused(self, client: ClientSocket) -> bool:
        transfer = client.transfer
        assert transfer is not None
        if self.dispatcher.may_still_run(transfer):  # first: this is called again and again
            return False
        data, arrived = transfer.moving.data, transfer.moving.arrived
        call = self.calls.prepare(data, arrived, 0)
        refusal = self.dispatcher.why_not(call, transfer) if call is not None else None
        if refusal is None:
            return False
        reply = self.calls.refuse(refusal, client)
        framed = is_framed(data)
        client.duplicated = True
        client.send_last(to_frame(reply) + NO_MORE_REQUESTS if framed else to_ascii(reply))
        self.close(client)
        return True

    def end_all_waiting(self) -> None:
        """End what no thread will serve any more, because none leads.

        Kept connections that rest, clients that other workers have not taken, requests that wait.
        """
        while (client := self.keep_alive.pop_any()) is not None:
            client.send_last(NO_MORE_REQUESTS)
            self.close(client)
        for client in self.outgoing.withdraw_all():
            self.end_returned(client)
        for client in self.calls.admission.pop_all():
            self._end_unserved(client, framed=client.framed)

    def end_all_returned(self) -> None:
        """End the clients that were returned so far."""
        while (client := self.outgoing.next_returned()) is not None:
            self.end_returned(client)

    def end_returned(self, client: ClientSocket) -> None:
        """Tell a client that was returned that its call is not run."""
        assert client.transfer is not None
        client.duplicated = True
        self._end_unserved(client, framed=is_framed(client.transfer.moving.data))

    def _end_unserved(self, client: ClientSocket, *, framed: bool) -> None:
        client.send_last(NO_MORE_REQUESTS if framed else to_ascii(self.not_run()))
        self.close(client)

    def end_leftover(self, arrival: Arrival[Call], seconds: float) -> None:
        """Tell a client that was left in the listen queue that nothing is run any more."""
        entry = self.calls.connection_table.enter(arrival.number, time.monotonic_ns())
        client = ClientSocket(arrival.descriptor, entry)
        try:
            self.say_shutting_down(client, seconds)
        except OSError:
            pass  # it has left by itself, or has sent nothing yet
        finally:
            self.close(client)

    def let_go(self, client: ClientSocket) -> None:
        """Another worker has taken the client: end what this one has of it. In any thread."""
        client.duplicated = False  # the connection goes on
        self.close(client)
        if self.calls.admission.count:
            wake(self.calls.admission.wakeup)  # the next one may be passed on
