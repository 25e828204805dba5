"""The worker pool, with real processes that only report, wait, and exit when told."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from conftest import close_wakeups

from cpanbridge.supervisor.config import Limits, Settings
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.fields import COMMAND_RETIRE
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.processes.context import (
    Mains,
    TemplateContext,
    WorkerContext,
    send_report,
)
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.retirement import Retirement
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.logs import LogSettings

WorkerMain = Callable[[WorkerContext], None]


def obedient(context: WorkerContext) -> None:
    """Boots, serves, and exits when told."""
    # Python runs a handler only after the call that it is about to make; the kernel has written
    # to this descriptor by then.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    send_report(context.report, None)
    select.select([told, context.lifeline], [], [], 60)
    os._exit(0)


def deaf(context: WorkerContext) -> None:
    """Boots, and never exits."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    send_report(context.report, None)
    select.select([context.lifeline], [], [], 60)


def slow(context: WorkerContext) -> None:
    """Never boots."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    select.select([context.lifeline], [], [], 60)


def no_template(context: TemplateContext) -> None:
    """These generations have no modules."""
    raise AssertionError(context)


class Setup:
    """A worker pool and its owner."""

    def __init__(self, slots: int, wanted: int, worker_main: WorkerMain, **limits: float) -> None:
        self.loop = Loop()
        self.shared = Shared.create(slots, Limits(), used=wanted)
        wakeups = [Wakeups.create() for _ in range(slots)]
        weakref.finalize(self, close_wakeups, wakeups)
        self.pool = WorkerPool(
            self, self.loop, self.shared, wakeups, Mains(worker_main, no_template)
        )
        self.retirement = Retirement(self.pool, lambda: None)
        settings = Settings(workers=wanted, limits=Limits(**limits))  # type: ignore[arg-type]
        self.generation = Generation(1, settings, [], LogSettings("stderr", "-", "text", False))
        self.failed: list[str] = []
        self.ready: list[Generation] = []

    def generation_ready(self, generation: Generation) -> None:
        self.ready.append(generation)
        self.pool.put_in_service(generation)

    def generation_failed(self, generation: Generation, reason: str) -> None:
        self.failed.append(reason)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            self.loop.after(0.01, lambda: None)
            self.loop.turn()
            for worker in self.pool.workers:
                if worker.pid:
                    pid, status = os.waitpid(worker.pid, os.WNOHANG)
                    if pid:
                        self.pool.ended(pid, status)

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pool.workers]

    def open(self) -> "Setup":
        self.pool.spawn(self.generation)
        self.until(lambda: self.generation.in_service)
        return self


NewSetup = Callable[..., Setup]


@pytest.fixture
def new_setup() -> Iterator[NewSetup]:
    setups: list[Setup] = []

    def make(slots: int, wanted: int, worker_main: WorkerMain = obedient, **limits: float) -> Setup:
        setups.append(Setup(slots, wanted, worker_main, **limits))
        return setups[-1]

    yield make
    for setup in setups:
        setup.pool.stop(None)
        setup.until(setup.pool.is_gone)


def test_a_generation_is_ready_when_each_of_its_workers_is(new_setup: NewSetup) -> None:
    setup = new_setup(4, 3).open()
    assert setup.ready == [setup.generation]
    assert [bool(pid) for pid in setup.pids()] == [True, True, True, False]


def test_a_retired_worker_is_told_when_its_replacement_is_ready(new_setup: NewSetup) -> None:
    setup = new_setup(3, 2).open()
    before = setup.pids()
    assert setup.retirement.retire(0, "a call hangs", replace_first=True)
    assert setup.shared.slots[0].command == 0
    assert setup.pids()[2] != 0
    setup.until(lambda: setup.pool.workers[0].told or not setup.pool.workers[0].pid)
    assert setup.pool.workers[2].ready
    setup.until(lambda: setup.pids()[0] == 0)
    assert setup.pids()[1] == before[1]
    assert setup.shared.slots[0].command == 0  # for the next worker
    assert setup.shared.header.deaths == 0
    # The slot is free again, and gets the replacement of the next worker that is retired.
    assert setup.retirement.retire(1, "another", replace_first=True)
    setup.until(lambda: setup.pids()[1] == 0)
    assert all(setup.pids()[slot] for slot in (0, 2))


@pytest.mark.parametrize(("slots", "replace_first"), [(3, False), (2, True)])
def test_without_room_for_two_the_replacement_starts_when_the_worker_has_ended(
    new_setup: NewSetup, slots: int, replace_first: bool
) -> None:
    setup = new_setup(slots, 2).open()
    before = setup.pids()
    assert setup.retirement.retire(1, "memory", replace_first=replace_first)
    assert setup.shared.slots[1].command == COMMAND_RETIRE
    assert [bool(pid) for pid in setup.pids()[:2]] == [True, True]
    setup.until(lambda: setup.pids()[1] not in (0, before[1]) and setup.pool.workers[1].ready)
    assert setup.pids()[0] == before[0]


def test_a_worker_is_retired_once_and_only_when_it_serves(new_setup: NewSetup) -> None:
    setup = new_setup(3, 2)
    setup.pool.spawn(setup.generation)
    assert not setup.retirement.retire(0, "it boots", replace_first=True)
    setup.until(lambda: setup.generation.in_service)
    assert not setup.retirement.retire(2, "there is no worker", replace_first=True)
    assert setup.retirement.retire(0, "once", replace_first=True)
    assert not setup.retirement.retire(0, "twice", replace_first=True)


def test_a_retired_worker_that_does_not_exit_is_killed(
    new_setup: NewSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.worker_process.KILL_MARGIN", 0.1)
    setup = new_setup(2, 1, deaf, graceful_timeout=0.1).open()
    before = setup.pids()[0]
    assert setup.retirement.retire(0, "it hangs", replace_first=False)
    setup.until(lambda: setup.pids()[0] not in (0, before))
    assert setup.shared.header.deaths == 0


def test_a_retired_worker_that_dies_before_it_is_told_gets_no_second_replacement(
    new_setup: NewSetup,
) -> None:
    setup = new_setup(3, 2).open()
    assert setup.retirement.retire(0, "a call hangs", replace_first=True)
    os.kill(setup.pids()[0], signal.SIGKILL)
    setup.until(lambda: setup.pids()[0] == 0)
    setup.until(lambda: setup.pool.workers[2].ready)
    assert setup.pids()[0] == 0
    assert setup.pool.workers[0].generation is None


def test_a_replacement_that_dies_while_it_boots_is_tried_again(new_setup: NewSetup) -> None:
    setup = new_setup(3, 2).open()
    old = setup.pids()[0]
    assert setup.retirement.retire(0, "a call hangs", replace_first=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(setup.pids()[2], signal.SIGKILL)
    setup.until(lambda: setup.pids()[0] != old)
    setup.until(lambda: setup.pool.workers[2].ready)


def test_a_worker_of_a_new_generation_that_dies_fails_the_generation(new_setup: NewSetup) -> None:
    setup = new_setup(3, 2, slow)
    setup.pool.spawn(setup.generation)
    os.kill(setup.pids()[0], signal.SIGKILL)
    setup.until(lambda: setup.failed)
    assert setup.failed == ["worker 0 died at boot: killed by signal 9 (SIGKILL)"]
    setup.pool.end(setup.generation)
    setup.until(setup.pool.is_gone)
    assert setup.shared.header.deaths == 0


def test_a_worker_more_is_refused_while_no_slot_is_free(new_setup: NewSetup) -> None:
    setup = new_setup(4, 1).open()
    exiting = Generation(2, setup.generation.settings, [], setup.generation.log)
    for worker in setup.pool.workers[1:]:
        worker.generation = exiting
    assert not setup.pool.add(setup.generation)
    assert setup.generation.wanted == 1
    setup.pool.workers[3].free()
    assert setup.pool.add(setup.generation)
    assert setup.pids()[3]
    os.close(exiting.opening)


def test_a_generation_that_found_too_few_free_slots_gets_those_that_become_free(
    new_setup: NewSetup,
) -> None:
    setup = new_setup(3, 2).open()
    coming = Generation(2, setup.generation.settings, [], setup.generation.log)
    setup.pool.spawn(coming)
    assert all(setup.pids())
    assert len(setup.pool.of(coming)) == 1
    assert setup.pool.remove(setup.generation)
    setup.until(lambda: coming.in_service)
    assert len(setup.pool.of(coming)) == 2


def test_a_client_in_the_queue_of_a_slot_without_a_worker_is_discarded(new_setup: NewSetup) -> None:
    """It was put in by a worker that had not seen the other one's end."""
    setup = new_setup(slots=2, wanted=1).open()
    ends = []
    for wakeups in setup.pool.spawner.wakeups:
        near, far = socket.socketpair()
        with near, handoff_sockets.end_of(os.dup(wakeups.put)) as queue:
            socket.send_fds(queue, [b"."], [near.fileno()])
        ends.append(far)
    with ends[0], ends[1]:
        setup.until(lambda: select.select(ends, [], [], 0)[0])
        assert select.select(ends, [], [], 0)[0] == [ends[1]]
        assert ends[1].recv(1) == b""
        os.kill(setup.pids()[0], signal.SIGKILL)
        setup.until(lambda: select.select([ends[0]], [], [], 0)[0])


def test_a_process_that_has_the_pid_of_a_dead_worker_is_left_alone(new_setup: NewSetup) -> None:
    setup = new_setup(2, 1)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        setup.shared.slots[1].pid = stranger.pid
        setup.shared.slots[1].started = 1
        assert not setup.pool.workers[1].inherit()
        assert setup.shared.slots[1].pid == 0
        assert stranger.poll() is None
        stranger.kill()
