"""What serves a worker's clients, put together; and the main thread's view of it."""

import math
import os
import time
from collections.abc import Sequence

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.processes.context import WorkerContext
from cpanbridge.workers.accept.acceptor import Acceptor
from cpanbridge.workers.accept.admission import Admission
from cpanbridge.workers.accept.balancing import Balancer
from cpanbridge.workers.accept.leader_followers import ThreadPool
from cpanbridge.workers.accept.listen_queue import ListenQueue
from cpanbridge.workers.accept.listeners import Listeners
from cpanbridge.workers.accept.own_threads import there_are_others
from cpanbridge.workers.accept.ready_clients import Arrival, ReadyClients
from cpanbridge.workers.accept.rejecter import Rejecter
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import ConnectionDrainer
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.reader import Reader
from cpanbridge.workers.client.spare_descriptors import spare
from cpanbridge.workers.connection import Connections
from cpanbridge.workers.endings import Endings
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.handoff.outgoing import Outgoing
from cpanbridge.workers.modules.registry import Registry
from cpanbridge.workers.requests.calls import Call, Calls
from cpanbridge.workers.requests.stats import StatisticsWriter
from cpanbridge.workers.requests.timeouts import CallTimeouts
from cpanbridge.workers.sessions.affinity import Affinity
from cpanbridge.workers.sessions.dispatch import Dispatcher
from cpanbridge.workers.sessions.ownership import Ownership
from cpanbridge.workers.sessions.placement import Placement
from cpanbridge.workers.sessions.sessions import Sessions


class Service:
    """One worker's. Called in the main thread.

    `attention` has the descriptors that are readable when `check` is to be called soon.
    """

    def __init__(self, context: WorkerContext, registry: Registry) -> None:
        shared, slot, wakeups = context.shared, context.slot, context.wakeups
        settings, limits = context.settings, context.settings.limits
        gate = self.gate = Gate(shared, slot, wakeups, settings.threads)
        self._slot = shared.slots[slot]
        statistics = StatisticsWriter(shared, slot)
        due = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._timeouts = CallTimeouts(slot, shared.slots[slot], limits.slow_request, due, gate)
        self._admission: Admission[Call] = Admission(
            gate, wakeups[slot].room, statistics.waited, self._can_pass_on
        )
        calls = Calls(settings, shared, self._admission, registry, self._timeouts, statistics)
        keep_alive = KeepAlive()

        spare.begin()

        # State, and which worker has it.
        ownership = Ownership(shared, slot)
        self._sessions = Sessions(shared.slots[slot], limits.stale_timeout, ownership.forget)
        self.drainer = ConnectionDrainer(limits, self._has_session)
        self._outgoing = Outgoing(shared, slot, wakeups, lambda each: self._endings.let_go(each))
        self._balancer = Balancer(shared, slot, self._outgoing)
        dispatcher = Dispatcher(shared, self._outgoing, calls.connection_table)
        placement = Placement(
            Affinity(ownership, self._sessions, dispatcher, limits.stale_timeout),
            self._sessions,
            self._balancer,
            dispatcher,
            self.drainer,
            lambda: gate.has_no_thread,
        )

        # A connection's life.
        self._endings = Endings(gate, calls, self.drainer, keep_alive, self._outgoing, dispatcher)
        reader = Reader(limits, calls.connection_table, lambda: self._threads.step_aside())
        connections = Connections(reader, calls, placement, self.drainer, keep_alive, self._endings)
        self._read_timeout = limits.read_timeout

        # Accepting, and the threads.
        self.listeners = Listeners(context.listeners, context.listener_box, shared)
        self._incoming = Incoming(shared, slot, wakeups, gate)
        ready = ReadyClients(
            self._incoming, self._outgoing, keep_alive, self._admission, calls.prepare
        )
        self._rejecter = Rejecter(calls.reject) if settings.overload == "reject" else None
        self._acceptor: Acceptor[Call] = Acceptor(
            ListenQueue(self.listeners, ready.epoll, shared, slot, gate),
            ready,
            gate,
            calls.prepare,
            self._may_be_held_up,
            self._rejecter,
        )
        self.most_threads = settings.thread_count
        self._threads: ThreadPool[Arrival[Call]] = ThreadPool(
            # As each connection may need one, and one more to lead: what a worker runs at a time
            # is the gate's to limit.
            limits.max_connections + 1,
            self._acceptor.next,
            connections.is_quick,
            connections.serve,
            self._acceptor.leave_to_others,
        )
        self.attention: Sequence[int] = (
            *(self._threads.attention, due, self._sessions.none_left, self.drainer.one_left),
        )

    def _can_pass_on(self) -> bool:
        """Whether another worker may run what waits here."""
        return self._balancer.worker_with_a_thread(many=self.drainer.exiting) is not None

    def _has_session(self, client: ClientSocket) -> bool:
        return self._sessions.is_live(client.process)

    def _may_be_held_up(self) -> bool:
        """Whether module code here may keep the interpreter lock when a client comes."""
        return self._threads.serving > 0 or there_are_others()

    @property
    def broken(self) -> bool:
        """Whether no client can be accepted any more, by a fault of the daemon's own."""
        return self._threads.broken

    @property
    def serving(self) -> int:
        """Connections that threads serve now."""
        return self._threads.serving

    @property
    def hangs(self) -> bool:
        """Whether a call has not ended in its time: the worker is to be retired."""
        return self._timeouts.hangs

    def start(self) -> None:
        """Accept clients from now on."""
        self._threads.start()

    def check(self) -> float:
        """Do what is due; returns in how many seconds to call it again.

        Called then, once a second, and when a descriptor of `attention` is readable.
        """
        seconds = min(
            self._threads.watch_leader(),
            self._timeouts.check() or math.inf,
            self._outgoing.look_after(),
            self.drainer.close_idle(),
        )
        if not self._threads.has_leader:
            self._endings.answer_returned()
            if self._incoming.discard_orphans():
                self._acceptor.wake()
        return seconds

    def check_listen_queue(self) -> None:
        """See that no client waits for whom only another worker was woken, or at another socket."""
        if self.listeners.follow():
            self._acceptor.wake()
        self._acceptor.check_listen_queue()

    # -- the end --

    def drain(self) -> None:
        """Accept no more, because another worker takes this one's place.

        Clients that have a session here are served on, until it ends.
        """
        self._acceptor.shut()
        self._sessions.let_go()
        self.drainer.drain()
        self.gate.ignore_overload()
        self._admission.exits()
        self.gate.wake_other_workers()

    @property
    def accepts_none(self) -> bool:
        """While it drains: whether no thread may accept a client any more."""
        return self._acceptor.is_shut or not self._threads.has_leader

    @property
    def is_drained(self) -> bool:
        """Whether no session and no client is left, so that it may be closed.

        Not before: a request of any of them may have to wait, or to be handed over.
        """
        if self._sessions.live or self._outgoing.count or self._admission.count:
            return False
        self.drainer.drain()
        return not self._slot.connections

    def close(self) -> None:
        """Let no thread lead any more."""
        self._acceptor.close()
        self._threads.close()

    def has_finished(self) -> bool:
        """After `close`: whether nothing is served any more; what was left has been ended."""
        finished = self._threads.is_finished  # first: a client that is served may be handed over
        self._endings.end_all_returned()
        if not finished or self._outgoing.count:
            return False
        self._endings.end_all_waiting()  # accepted or kept just as it was closed
        return True

    def cut(self, seconds: float) -> int:
        """The time to drain is over: run nothing further. Connections that are still served."""
        self.close()
        self.drainer.stop(daemon_ends=False)
        finished = self._threads.wait_until_finished(seconds)
        self._endings.end_all_waiting()
        return 0 if finished else self._threads.serving

    def stop(self, until: float, *, leave_queue: bool) -> int:
        """The daemon ends: finish what runs, and tell all other clients so.

        With `leave_queue` those that were not accepted are left to the next daemon. `until` is
        CLOCK_MONOTONIC seconds. Returns how many connections are still served then.
        """
        self.close()
        self.drainer.stop(daemon_ends=True)
        no_leader = self._threads.wait_until_no_leader(until - time.monotonic())
        self._endings.end_all_waiting()
        if no_leader and not leave_queue:
            while (arrival := self._acceptor.take_leftover(until)) is not None:
                self._endings.end_leftover(arrival, self._read_timeout)
        finished = self._threads.wait_until_finished(until - time.monotonic())
        self._endings.end_all_waiting()
        return 0 if finished else self._threads.serving

    def wait_for_rejected(self, seconds: float) -> None:
        """Wait until all clients that were rejected have their answer."""
        if self._rejecter is not None:
            self._rejecter.wait_until_empty(seconds)

    def close_sessions(self) -> None:
        """Close what modules keep for clients. Called when nothing runs any more."""
        self._sessions.close_all()
