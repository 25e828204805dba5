"""A worker's main thread: it watches, and runs no module code.

It watches for the master's death (the lifeline pipe ends), signals, the time, and what client
threads and other workers ask of it. So a module that hangs cannot keep the worker from exiting.

The worker accepts its first client when the master puts its whole generation in service (an
eventfd). TERM says that it is to exit; its slot says how. If the daemon stops, clients that wait
are told so; if it goes on, they are left to the other workers; if it restarts, to the next daemon.
In all cases the worker accepts no more, finishes what runs, and exits. QUIT exits at once, USR1
reopens the log, USR2 writes to it what each thread is at. INT and HUP reach the whole process group
of a terminal; they are for the master, which tells its workers what to do.
"""

import contextlib
import logging
import math
import os
import random
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

from cpanbridge.supervisor.memory import fields
from cpanbridge.supervisor.processes.context import WorkerContext
from cpanbridge.supervisor.wording import count_of
from cpanbridge.workers import boot
from cpanbridge.workers.client.spool import give_memory_back
from cpanbridge.workers.modules.registry import Registry
from cpanbridge.workers.service import Service

LOGGER = logging.getLogger("cpanbridge.worker")

TICK_SECONDS = 1.0
LAST_WORDS_SECONDS = 0.5
RESTART_SECONDS = 0.5  # for clients that were accepted before a restart, until what runs is left


class MainThread:
    """The main thread of a worker whose modules are imported."""

    def __init__(self, context: WorkerContext, service: Service, registry: Registry) -> None:
        self._context = context
        self._service = service
        self._registry = registry
        self._limits = context.settings.limits
        self._slot = context.shared.slots[context.slot]
        self._wakeup = context.wakeups[context.slot].main
        self._cleanups = context.shared.header.cleanups  # that were asked for before
        # Up to a tenth more, so that workers that began together are not retired together.
        most = context.settings.max_requests
        self._most_requests = most + random.randrange(most // 10 + 1)
        self._exiting = self._closed = False
        self._exit_by = math.inf  # CLOCK_MONOTONIC seconds; once it is to exit
        self._stop_at = math.inf  # CLOCK_MONOTONIC seconds; in a restart: to run nothing further
        self._next_tick = 0.0
        self._cleanup_thread = threading.Thread()  # not started
        self._next_cleanup = time.monotonic() + self._limits.cleanup_interval

    def watch(self) -> None:
        """Serve until told to exit, or the master is gone; return when what ran has finished."""
        signals = boot.signal_wakeup()
        signal.signal(signal.SIGTERM, lambda *_: None)  # heard through the wake-up descriptor
        context, service = self._context, self._service
        boot.reopen_logs_if_requested(context)  # while it imported modules
        events = (*service.attention, self._wakeup)  # eventfds that only wake this thread
        selector = selectors.DefaultSelector()
        selector.register(signals, selectors.EVENT_READ)
        for descriptor in (context.lifeline, context.opening, *events):
            selector.register(descriptor, selectors.EVENT_READ)
        while not self._has_finished():
            ready = {key.fileobj for key, _ in selector.select(self._until_next_check())}
            for event in ready.intersection(events):
                assert isinstance(event, int)
                os.eventfd_read(event)
            if self._wakeup in ready:
                service.check_listen_queue()
                self._look_for_cleanup()
            if service.broken and not self._exiting:
                self._retire(self._graceful_end())
            if context.opening in ready:
                selector.unregister(context.opening)
                service.start()
                self._slot.serves = not self._exiting
            if context.lifeline in ready:
                LOGGER.error("Worker %d: the master is gone, exiting", context.slot)
                self._close_queues()
                self._stop(self._graceful_end())
                break
            received = signals.recv(4096) if signals in ready else b""
            if signal.SIGUSR1 in received:
                boot.reopen_logs(context)
            if signal.SIGTERM in received:
                exit_by = self._slot.exit_by / 1e9 or math.inf
                if self._slot.command == fields.COMMAND_STOP:
                    self._stop(exit_by)
                    break
                if self._slot.command == fields.COMMAND_RESTART:
                    self._stop_at = time.monotonic() + RESTART_SECONDS
                told = self._slot.command != fields.COMMAND_NONE
                self._retire(exit_by if told else self._graceful_end())
            if time.monotonic() >= self._stop_at:
                self._stop(self._exit_by)
                break
        service.wait_for_rejected(min(1.0, self._exit_by - time.monotonic()))
        self._end_sessions()

    def _until_next_check(self) -> float:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_SECONDS
            self._tick(now)
        seconds = min(self._service.check(), self._next_tick - now)
        if self._service.hangs:
            self._ask_to_be_retired(fields.RETIREMENT_HANGS)
        if self._exiting:
            seconds = min(seconds, min(self._exit_by, self._stop_at) - time.monotonic())
        return max(0.0, seconds)

    def _tick(self, now: float) -> None:
        context, most = self._context, self._service.most_threads
        busy = min(self._service.serving, most)
        boot.show_title(f"worker {context.slot} gen {context.generation} busy {busy}/{most}")
        self._service.check_listen_queue()
        give_memory_back()
        admitted = self._slot.admitted - self._slot.admitted_before
        if self._most_requests and admitted >= self._most_requests:
            self._ask_to_be_retired(fields.RETIREMENT_WORN)
        if now >= self._next_cleanup:
            self._next_cleanup = now + self._limits.cleanup_interval
            if not self._cleanup_thread.is_alive():
                self._start_cleanup()

    def _ask_to_be_retired(self, request: int) -> None:
        slot = self._slot
        before = slot.retirement_request
        # A worn worker that hangs besides is killed sooner: that is another request.
        if before == fields.RETIREMENT_NONE or (request, before) == (
            fields.RETIREMENT_HANGS,
            fields.RETIREMENT_WORN,
        ):
            slot.retirement_request = request
            os.eventfd_write(self._context.wake_master, 1)

    # -- exiting --

    def _graceful_end(self) -> float:
        return time.monotonic() + self._limits.graceful_timeout

    @property
    def _outlived(self) -> bool:
        """Whether another daemon, or another master, serves the clients that wait in the queues.

        Another master does while this worker's generation has never been in service.
        """
        header = self._context.shared.header
        restarts = header.sockets_are_passed_on or self._slot.command == fields.COMMAND_RESTART
        in_service = self._context.generation <= header.generation
        return self._context.lent or bool(restarts) or not in_service

    def _close_queues(self) -> None:
        """No worker will accept from these queues again; let clients see that at once."""
        if not self._outlived:
            for listener in self._service.listeners.sockets:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)

    def _retire(self, exit_by: float) -> None:
        """Accept no more; the daemon goes on, so clients that wait are left to other workers."""
        self._exit_by = exit_by
        if not self._exiting:
            self._exiting = True
            self._slot.serves = 0
            self._service.drain()

    def _has_finished(self) -> bool:
        """Whether a worker that retires may exit: nothing runs any more, or its time is over."""
        if not self._exiting:
            return False
        service = self._service
        if service.is_drained and not self._closed:
            self._closed = True
            service.close()
        if service.accepts_none:
            self._slot.shut = 1
        if self._closed and service.has_finished():
            return True
        if time.monotonic() < self._exit_by:
            return False
        self._slot.serves = 0
        self._say_what_is_cut(service.cut(LAST_WORDS_SECONDS))
        return True

    def _stop(self, exit_by: float) -> None:
        """The daemon ends: finish what runs, and tell all other clients so."""
        self._exit_by = exit_by
        self._slot.serves = 0
        self._say_what_is_cut(self._service.stop(exit_by, leave_queue=self._outlived))

    def _say_what_is_cut(self, connections: int) -> None:
        if connections:
            what = "Worker %d: %s still busy at the end of their time, cutting them"
            LOGGER.warning(what, self._context.slot, count_of(connections, "connection"))

    # -- the modules' hooks --

    def _look_for_cleanup(self) -> None:
        """Close stale connections, if a client has asked the daemon to."""
        asked = self._context.shared.header.cleanups
        if asked != self._cleanups:
            self._cleanups = asked
            self._service.drainer.close_stale()

    def _end_sessions(self) -> None:
        """Close what modules keep for clients, and run their `shutdown` hooks."""

        def run(hook: str) -> None:
            self._service.close_sessions()
            self._run_hooks(hook)

        seconds = min(self._exit_by - time.monotonic(), self._limits.graceful_timeout)
        try:
            thread = self._start(run, "shutdown")
        except RuntimeError:  # no more threads: if a hook hangs, the master kills this process
            run("shutdown")
            return
        thread.join(max(1.0, seconds))
        if thread.is_alive():
            LOGGER.warning("Worker %d: a shutdown() hook does not return", self._context.slot)

    def _start_cleanup(self) -> None:
        hook = "cleanup_stale_resources"
        try:
            self._cleanup_thread = self._start(self._run_hooks, hook)
        except RuntimeError:  # no more threads
            LOGGER.warning("Worker %d: no thread for %s(), left out once", self._context.slot, hook)

    def _start(self, run: Callable[[str], None], hook: str) -> threading.Thread:
        """Run hooks in a thread, so that one that hangs keeps no signal from being heard.

        Raises RuntimeError when there are no more threads.
        """
        thread = threading.Thread(target=run, args=(hook,), name=hook, daemon=True)
        thread.start()
        return thread

    def _run_hooks(self, name: str) -> None:
        for module, hook in self._registry.hooks(name):
            try:
                hook()
            except BaseException:
                LOGGER.exception("%s.%s() failed", module, name)
