"""One worker process: boot, serve, drain.

Everything here runs in the worker process, in its main thread. It imports the modules, as far as
the template that it was forked from has not, reports ready, sends a first thread to the door, and
from then on only watches: for the master's death (the lifeline pipe ends), for signals, and for the
time to run the modules' clean-up hooks. Client threads run everything else, so a module that hangs
cannot keep the worker from hearing of a stop.

It lets the first client in when the master opens the door to its whole generation.

TERM says that the worker is to leave; its slot says how. Where the daemon stops, clients that wait
are told so; where it goes on, they are left to the other workers. In both cases the worker accepts
no more, finishes what runs, and leaves. QUIT leaves at once, USR1 reopens the
log, USR2 writes to it what each thread is at. INT and HUP reach the whole process group of a
terminal; they are for the master, which tells its workers what to do.
"""

import contextlib
import gc
import logging
import math
import os
import random
import selectors
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.layout import (
    COMMAND_RETIRE,
    COMMAND_STOP,
    RETIREMENT_HANGS,
    RETIREMENT_NONE,
    RETIREMENT_WORN,
)
from cpanbridge.supervisor.processes.context import WorkerContext, send_report
from cpanbridge.workers import boot
from cpanbridge.workers.accept.acceptor import Acceptor, Arrival
from cpanbridge.workers.accept.balance import Balance
from cpanbridge.workers.accept.deference import Deference
from cpanbridge.workers.accept.leader_followers import ThreadPool
from cpanbridge.workers.accept.own_threads import there_are_others
from cpanbridge.workers.accept.rejecter import Rejecter
from cpanbridge.workers.accept.restraint import Restraint
from cpanbridge.workers.client.draining import ConnectionDrainer
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.connection import Connections, Stops
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.modules import builtin
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError
from cpanbridge.workers.modules.orphans import end_with_master
from cpanbridge.workers.modules.registry import Registry
from cpanbridge.workers.requests.calls import Call, Calls
from cpanbridge.workers.requests.timeouts import CallTimeouts
from cpanbridge.workers.sessions.affinity import Affinity

LOGGER = logging.getLogger("cpanbridge.worker")

TITLE_SECONDS = 1.0
# After so long a thread that computes gives others the interpreter lock, who ask for it when they
# have waited for something. Python's own 5 ms make a quick call beside slow ones take many times
# as long.
SWITCH_SECONDS = 0.0005
LAST_WORDS_SECONDS = 0.5


def run(context: WorkerContext) -> NoReturn:
    """Be a worker. Called in the child, right after the fork; ends the process."""

    def work() -> int:
        boot.begin(context, _boot_title(context))
        return _work(context, Loader(context.settings, builtin.NAMES))

    boot.run_to_the_end(f"Worker {context.slot}", work)


def run_forked(context: WorkerContext, loader: Loader, parent: int) -> NoReturn:
    """Be a worker that a template has forked, with what that has loaded; ends the process.

    `parent` is a pidfd of the process between the two.
    """

    def work() -> int:
        boot.begin_forked(context, _boot_title(context), parent)
        return _work(context, loader)

    boot.run_to_the_end(f"Worker {context.slot}", work)


def _boot_title(context: WorkerContext) -> str:
    return f"worker {context.slot} gen {context.generation} boots"


def _work(context: WorkerContext, loader: Loader) -> int:
    """Boot and serve; the exit status."""
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        registry = _boot(context, loader)
    except ModuleLoadError as error:
        send_report(context.report, str(error))
        return 1
    worker = Worker(context, registry)
    end_with_master(False)  # from now on it finishes what it runs
    send_report(context.report, None)
    os.close(context.report)
    worker.watch()
    return 1 if worker.broken else 0


def _boot(context: WorkerContext, loader: Loader) -> Registry:
    names: list[str] = []
    built_in = builtin.built_in(context.shared, context.settings, lambda: names, context.wakeups)
    registry = loader.load(built_in)
    names.extend(registry.names)
    for name, reason in registry.left_out.items():
        LOGGER.warning("Worker %d: module %s is left out: %s", context.slot, name, reason)
    # What is loaded now stays; the collector need not visit it again and again.
    gc.collect()
    gc.freeze()
    return registry


def _with_jitter(requests: int) -> int:
    """Up to a tenth more, so that workers that began together are not retired together."""
    return requests + random.randrange(requests // 10 + 1)


class Worker:
    """The worker once its modules are imported."""

    def __init__(self, context: WorkerContext, registry: Registry) -> None:
        self._context = context
        self._limits = context.settings.limits
        self._registry = registry
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self._stops = Stops(os.eventfd(0, flags), os.eventfd(0, flags))
        self._gate = Gate(context.shared, context.slot, context.wakeups)
        self._attention = os.eventfd(0, flags)  # the watch has something to look at
        self._slot = context.shared.slots[context.slot]
        self._watch = CallTimeouts(
            *(context.slot, self._slot, self._limits.slow_request, self._attention, self._gate)
        )
        calls = Calls(
            context.settings, context.slot, context.shared, self._gate, registry, self._watch
        )
        self._affinity = Affinity(
            *(context.shared, context.slot, context.wakeups, self._limits, calls.connection_table),
            lambda client: self._connections.let_go(client),
        )
        keep_alive = KeepAlive()
        self._drainer = ConnectionDrainer(
            self._limits, lambda client: self._affinity.sessions.is_live(client.process)
        )
        self._connections = Connections(
            *(self._limits, self._gate, calls, self._affinity, self._drainer, keep_alive),
            Balance(
                context.shared, context.slot, self._affinity.outgoing, context.settings.threads
            ),
            self._stops,
            lambda: self._threads.step_aside(),
            lambda: self._acceptor.queue_up_again(),
        )
        self._rejecter = Rejecter(calls.reject) if context.settings.overload == "reject" else None
        self._incoming = Incoming(context.shared, context.slot, context.wakeups, self._gate)
        self._acceptor: Acceptor[Call] = Acceptor(
            *(context.listeners, self._gate, calls.prepare, self._may_be_held_up),
            self._incoming,
            *(self._affinity.outgoing, keep_alive, Restraint(self._affinity.outgoing)),
            Deference(context.shared, context.slot),
            self._rejecter,
        )
        self._wakeup = context.wakeups[context.slot].watch
        self._cleanups = context.shared.header.cleanups  # that were asked for before
        self._thread_count = context.settings.thread_count
        # Where threads are bounded only by the connections that there may be, one more is at the
        # door when all are taken: to see who is to wait, or to be turned away.
        most = self._thread_count + (context.settings.threads == 0)
        self._threads: ThreadPool[Arrival[Call]] = ThreadPool(
            *(most, self._acceptor.next, self._connections.is_quick, self._connections.serve),
            self._acceptor.left,
        )
        self._most_requests = _with_jitter(context.settings.max_requests)
        self._retiring = self._door_closed = False
        self._exit_by = math.inf  # CLOCK_MONOTONIC, seconds; once it is to leave
        self._title = ""
        self._next_title = 0.0
        self._cleanup_thread: threading.Thread | None = None
        self._next_cleanup = time.monotonic() + self._limits.cleanup_interval

    @property
    def broken(self) -> bool:
        """Whether it left because it could not go on."""
        return self._threads.broken

    def watch(self) -> None:
        """Serve until told to leave, or the master is gone; return when what ran has finished."""
        signals, wakeup = socket.socketpair()
        for end in (signals, wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # heard through the wake-up descriptor
        selector = selectors.DefaultSelector()
        selector.register(signals, selectors.EVENT_READ)
        selector.register(self._context.lifeline, selectors.EVENT_READ)
        selector.register(self._threads.attention, selectors.EVENT_READ)
        selector.register(self._context.opening, selectors.EVENT_READ)
        selector.register(self._wakeup, selectors.EVENT_READ)
        selector.register(self._attention, selectors.EVENT_READ)
        selector.register(self._affinity.sessions.none_left, selectors.EVENT_READ)
        selector.register(self._drainer.none_kept, selectors.EVENT_READ)
        self._show_title()
        while not self._has_finished():
            ready = {key.fileobj for key, _ in selector.select(self._until_next_look())}
            if self._threads.attention in ready:
                os.eventfd_read(self._threads.attention)
                if self._threads.broken:
                    self._retire(self._graceful_end())
            if self._attention in ready:
                os.eventfd_read(self._attention)
            if self._wakeup in ready:
                os.eventfd_read(self._wakeup)
                self._look_for_cleanup()
            if self._affinity.sessions.none_left in ready:
                os.eventfd_read(self._affinity.sessions.none_left)
            if self._drainer.none_kept in ready:
                os.eventfd_read(self._drainer.none_kept)
            if self._context.opening in ready:
                selector.unregister(self._context.opening)
                self._threads.start()
                self._slot.serves = not self._retiring
            if self._context.lifeline in ready:
                LOGGER.error("Worker %d: the master is gone, leaving", self._context.slot)
                self._close_queues()
                self._stop_serving(self._graceful_end())
                break
            if signals in ready and signal.SIGTERM in signals.recv(4096):
                exit_by = self._slot.exit_by / 1e9 or math.inf
                if self._slot.command == COMMAND_STOP:
                    self._stop_serving(exit_by)
                    break
                retired = self._slot.command == COMMAND_RETIRE
                self._retire(exit_by if retired else self._graceful_end())
            self._keep_time()
        if self._rejecter is not None:
            self._rejecter.wait_until_empty(min(1.0, self._exit_by - time.monotonic()))
        self._run_hooks("shutdown", self._exit_by - time.monotonic())

    def _may_be_held_up(self) -> bool:
        """Whether something here may keep the interpreter lock when a client comes."""
        return self._threads.serving > 0 or there_are_others()

    def _close_queues(self) -> None:
        """Nobody will accept from these queues again; let clients see that at once.

        Unless this worker's generation has never been in service: then another master still is.
        """
        if self._context.lent:
            return  # the service manager's: its next daemon serves who waits there
        if self._context.generation <= self._context.shared.header.generation:
            for listener in self._context.listeners:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)

    def _graceful_end(self) -> float:
        return time.monotonic() + self._limits.graceful_timeout

    def _retire(self, exit_by: float) -> None:
        """Let nobody in any more; the daemon goes on, so who waits outside is left to others.

        Clients that have a session here are served on, until it ends.
        """
        self._exit_by = exit_by
        if not self._retiring:
            self._retiring = True
            self._slot.serves = 0
            self._acceptor.shut()
            self._affinity.sessions.let_go()
            self._drainer.leave()  # before anybody is woken, who would not know why
            self._gate.leave()
            self._gate.leave_to_others()
            os.eventfd_write(self._stops.acceptor, 1)

    def _close_door(self) -> None:
        if not self._door_closed:
            self._door_closed = True
            self._slot.serves = 0
            self._acceptor.close()
            self._threads.close_door()

    def _has_finished(self) -> bool:
        """Whether a worker that retires may leave: nothing runs any more, or its time is over."""
        if not self._retiring:
            return False
        if not self._affinity.sessions.live and not self._affinity.outgoing.count:
            self._drainer.leave()
            if not self._drainer.kept:
                self._close_door()
        if self._acceptor.is_shut or self._threads.door_is_left:
            self._slot.shut = 1
        if self._door_closed:
            idle = self._threads.idle  # asked first: who is served may be handed over yet
            while (client := self._affinity.outgoing.next_back()) is not None:
                self._connections.take_back(client)
            if idle and not self._affinity.outgoing.count:
                self._end_what_waits()  # a client that was let in just as the door was closed
                return True
        if time.monotonic() < self._exit_by:
            return False
        self._close_door()
        # What still waits for room is told that it is not run.
        self._drainer.stop(daemon_ends=False)
        os.eventfd_write(self._stops.all, 1)
        if not self._threads.wait_until_idle(LAST_WORDS_SECONDS):
            self._say_what_is_cut()
        self._end_what_waits()
        return True

    def _end_what_waits(self) -> None:
        """Nobody is at the door any more who could take up kept connections that rest.

        Or let those in that other workers do not take.
        """
        self._connections.end_all_at_rest()
        for client in self._affinity.outgoing.withdraw_all():
            self._connections.take_back(client)

    def _until_next_look(self) -> float:
        seconds = min(
            self._threads.look_after_door(),
            self._watch.look() or math.inf,
            self._affinity.outgoing.look_after(),
            self._drainer.close_idle(),
        )
        self._acceptor.look_out()
        if self._threads.door_is_left:
            self._connections.answer_for_the_door()
            if self._incoming.look_through():
                self._acceptor.look_again()
        if self._watch.hangs:
            self._ask_to_be_retired(RETIREMENT_HANGS)
        if self._retiring:
            seconds = min(seconds, max(0.0, self._exit_by - time.monotonic()))
        return seconds

    def _stop_serving(self, exit_by: float) -> None:
        """The daemon ends: finish what runs, and tell everybody else so."""
        self._exit_by = exit_by
        self._close_door()
        self._drainer.stop(daemon_ends=True)
        os.eventfd_write(self._stops.acceptor, 1)
        os.eventfd_write(self._stops.all, 1)
        door_is_left = self._threads.wait_until_door_is_left(exit_by - time.monotonic())
        self._end_what_waits()
        if door_is_left and not self._context.lent:
            while (arrival := self._acceptor.take_leftover(exit_by)) is not None:
                self._connections.reject(arrival)
        if not self._threads.wait_until_idle(exit_by - time.monotonic()):
            self._say_what_is_cut()
        self._end_what_waits()

    def _say_what_is_cut(self) -> None:
        LOGGER.warning(
            "Worker %d: %d connections still busy at the end of their time, cutting them",
            self._context.slot,
            self._threads.serving,
        )

    def _look_for_cleanup(self) -> None:
        """Close stale connections, if anybody has asked the daemon to."""
        asked = self._context.shared.header.cleanups
        if asked != self._cleanups:
            self._cleanups = asked
            self._drainer.close_stale()

    def _ask_to_be_retired(self, retirement_request: int) -> None:
        slot = self._context.shared.slots[self._context.slot]
        # A worn worker that hangs besides is killed sooner: that is another plea.
        if slot.retirement_request == RETIREMENT_NONE or (
            retirement_request,
            slot.retirement_request,
        ) == (RETIREMENT_HANGS, RETIREMENT_WORN):
            slot.retirement_request = retirement_request
            os.eventfd_write(self._context.retirement_request, 1)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now >= self._next_title:
            self._next_title = now + TITLE_SECONDS
            self._show_title()
            slot = self._context.shared.slots[self._context.slot]
            if self._most_requests and slot.admitted - slot.admitted_before >= self._most_requests:
                self._ask_to_be_retired(RETIREMENT_WORN)
        if now >= self._next_cleanup:
            self._next_cleanup = now + self._limits.cleanup_interval
            self._start_cleanup()

    def _start_cleanup(self) -> None:
        if self._cleanup_thread is None or not self._cleanup_thread.is_alive():
            self._cleanup_thread = self._hook_thread("cleanup_stale_resources")
            self._cleanup_thread.start()

    def _run_hooks(self, name: str, seconds: float) -> None:
        thread = self._hook_thread(name)
        thread.start()
        thread.join(max(1.0, min(seconds, self._limits.graceful_timeout)))
        if thread.is_alive():
            LOGGER.warning("Worker %d: a %s() hook does not return", self._context.slot, name)

    def _hook_thread(self, name: str) -> threading.Thread:
        """A thread, so that a hook that hangs keeps nobody from hearing a signal."""

        def run_all() -> None:
            if name == "shutdown":
                self._affinity.sessions.close_all()
            for module, hook in self._registry.hooks(name):
                try:
                    hook()
                except BaseException:
                    LOGGER.exception("%s.%s() failed", module, name)

        return threading.Thread(target=run_all, name=name, daemon=True)

    def _show_title(self) -> None:
        busy = min(self._threads.serving, self._thread_count)
        title = f"worker {self._context.slot} gen {self._context.generation} busy {busy}/{self._thread_count}"
        if title != self._title:
            self._title = title
            boot.show_title(title)
