"""Where a call runs: in the worker that has its state, or with fewer kept connections, or here.

Called from the threads that serve clients.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.workers.accept.balancing import TAKE_SECONDS, Balancer
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import ConnectionDrainer
from cpanbridge.workers.client.transfer import Transfer
from cpanbridge.workers.handoff.message import MOST_INLINE
from cpanbridge.workers.requests.calls import Call
from cpanbridge.workers.sessions.affinity import Affinity
from cpanbridge.workers.sessions.dispatch import Dispatcher, patience
from cpanbridge.workers.sessions.session import Session, run_in
from cpanbridge.workers.sessions.sessions import Sessions


@dataclass(eq=False)
class Placement:
    """One worker's decision for each call."""

    affinity: Affinity
    sessions: Sessions
    balancer: Balancer
    dispatcher: Dispatcher
    drainer: ConnectionDrainer
    has_no_thread: Callable[[], bool]  # as many requests run here as may

    def enter(self, call: Call, client: ClientSocket, data: Callable[[], bytes]) -> Session | None:
        """Return when the call is to run here: its session, or None if it has none.

        `leave` must follow for a session. `data` is what was read of the client, from this call on.
        Raises HandedOver when another worker runs it; Refusal and Draining as `Affinity.join` does.
        """
        if call.target.owned_as is not None:
            drainer = self.drainer
            stop = drainer.stops if drainer.stays(client) else drainer.drains
            session = self.affinity.join(call, client, data, stop)
            run_in(session)
            return session
        if client.transfer is not None:
            self._go_on_here(client)
        elif call.ticket and (self.drainer.exiting or self.has_no_thread()):
            self._pass_on(call, client, data())
        elif client.framed:
            self._spread(call, client, data)
        return None

    def leave(self, session: Session) -> None:
        """The call has ended."""
        run_in(None)
        self.sessions.leave(session)

    def _spread(self, call: Call, client: ClientSocket, data: Callable[[], bytes]) -> None:
        """Hand a kept connection to a worker that has fewer. Raises HandedOver when it is."""
        balancer = self.balancer
        if not client.in_keep_alive or call.arrived < balancer.next_check or self.drainer.exiting:
            return
        request = data()
        if len(request) > MOST_INLINE:
            return  # if it is not taken, a copy would stay in memory until it is discarded
        if self.sessions.is_live(client.process):
            return
        owner = balancer.worker_with_fewer(call.arrived, self.drainer.kept)
        if owner is not None:
            self._send(call, client, request, owner)

    def _pass_on(self, call: Call, client: ClientSocket, data: bytes) -> None:
        """Hand a request that waits to a worker that may run it sooner. Raises HandedOver."""
        owner = self.balancer.worker_with_a_thread(many=self.drainer.exiting)
        if owner is not None:
            self._send(call, client, data, owner)

    def _go_on_here(self, client: ClientSocket) -> None:
        """A client was returned."""
        client.transfer = None
        client.duplicated = True  # it may be in the queue still
        self.balancer.was_not_taken(time.monotonic())

    def _send(self, call: Call, client: ClientSocket, request: bytes, owner: Owner) -> None:
        """Hand a client over. Raises HandedOver; returns if it stays here."""
        now = time.monotonic()
        until = min(now + TAKE_SECONDS, call.arrived + patience(call))
        if until <= now:
            return  # only to be told that it is late
        with self.drainer.paused():
            moving = self.dispatcher.moving(
                call, client, request, input_may_have_ended=client.input_may_have_ended
            )
            client.transfer = Transfer(moving, owner, until, may_stay=True)
        self.dispatcher.send(client)
        self.balancer.was_not_taken(time.monotonic())
