"""The workforce, with real processes whose whole work is to report, wait, and leave when told."""

import contextlib
import os
import select
import signal
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from conftest import take_down

from cpanbridge.supervisor.config import Limits, Settings
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory.layout import COMMAND_RETIRE, Shared
from cpanbridge.supervisor.processes.context import (
    Mains,
    TemplateContext,
    WorkerContext,
    send_report,
)
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.logs import LogSettings

WorkerMain = Callable[[WorkerContext], None]


def obedient(context: WorkerContext) -> None:
    """Boots, serves, and leaves when told."""
    # Python runs a handler only once it is back from what it is about to call; the kernel has
    # written to this descriptor by then.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    send_report(context.report, None)
    select.select([told, context.lifeline], [], [], 60)
    os._exit(0)


def deaf(context: WorkerContext) -> None:
    """Boots, and never leaves."""
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


class Firm:
    """A workforce and whoever owns it."""

    def __init__(self, slots: int, wanted: int, worker_main: WorkerMain, **limits: float) -> None:
        self.loop = Loop()
        self.shared = Shared.create(slots, Limits(), used=wanted)
        wakeups = [Wakeups.hang() for _ in range(slots)]
        weakref.finalize(self, take_down, wakeups)
        self.pool = WorkerPool(
            self, self.loop, self.shared, wakeups, Mains(worker_main, no_template)
        )
        settings = Settings(workers=wanted, limits=Limits(**limits))  # type: ignore[arg-type]
        self.generation = Generation(1, settings, [], LogSettings("stderr", "-", "text", False))
        self.failed: list[str] = []
        self.ready: list[Generation] = []

    def generation_ready(self, generation: Generation) -> None:
        self.ready.append(generation)
        self.pool.put_in_service(generation)

    def generation_failed(self, generation: Generation, reason: str) -> None:
        self.failed.append(reason)

    def worker_gone(self) -> None:
        pass

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

    def open(self) -> "Firm":
        self.pool.spawn(self.generation)
        self.until(lambda: self.generation.in_service)
        return self


NewFirm = Callable[..., Firm]


@pytest.fixture
def new_firm() -> Iterator[NewFirm]:
    firms: list[Firm] = []

    def make(slots: int, wanted: int, worker_main: WorkerMain = obedient, **limits: float) -> Firm:
        firms.append(Firm(slots, wanted, worker_main, **limits))
        return firms[-1]

    yield make
    for firm in firms:
        firm.pool.stop(None)
        firm.until(firm.pool.is_gone)


def test_a_generation_is_ready_when_each_of_its_workers_is(new_firm: NewFirm) -> None:
    firm = new_firm(4, 3).open()
    assert firm.ready == [firm.generation]
    assert [bool(pid) for pid in firm.pids()] == [True, True, True, False]


def test_a_retired_worker_is_told_when_its_replacement_is_ready(new_firm: NewFirm) -> None:
    firm = new_firm(3, 2).open()
    before = firm.pids()
    assert firm.pool.retire(0, "a call hangs", replace_first=True)
    assert firm.shared.slots[0].command == 0
    assert firm.pids()[2] != 0
    firm.until(lambda: firm.pool.workers[0].told or not firm.pool.workers[0].pid)
    assert firm.pool.workers[2].ready
    firm.until(lambda: firm.pids()[0] == 0)
    assert firm.pids()[1] == before[1]
    assert firm.shared.slots[0].command == 0  # for whoever comes next
    assert firm.shared.header.deaths == 0
    # The seat is free again, and the next one to be retired is replaced there.
    assert firm.pool.retire(1, "another", replace_first=True)
    firm.until(lambda: firm.pids()[1] == 0)
    assert all(firm.pids()[slot] for slot in (0, 2))


@pytest.mark.parametrize(("slots", "replace_first"), [(3, False), (2, True)])
def test_without_room_for_two_the_replacement_follows_when_the_worker_has_gone(
    new_firm: NewFirm, slots: int, replace_first: bool
) -> None:
    firm = new_firm(slots, 2).open()
    before = firm.pids()
    assert firm.pool.retire(1, "memory", replace_first=replace_first)
    assert firm.shared.slots[1].command == COMMAND_RETIRE
    assert [bool(pid) for pid in firm.pids()[:2]] == [True, True]
    firm.until(lambda: firm.pids()[1] not in (0, before[1]) and firm.pool.workers[1].ready)
    assert firm.pids()[0] == before[0]


def test_a_worker_is_retired_once_and_only_when_it_serves(new_firm: NewFirm) -> None:
    firm = new_firm(3, 2)
    firm.pool.spawn(firm.generation)
    assert not firm.pool.retire(0, "it boots", replace_first=True)
    firm.until(lambda: firm.generation.in_service)
    assert not firm.pool.retire(2, "nobody sits there", replace_first=True)
    assert firm.pool.retire(0, "once", replace_first=True)
    assert not firm.pool.retire(0, "twice", replace_first=True)


def test_a_retired_worker_that_does_not_leave_is_killed(
    new_firm: NewFirm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.worker_process.KILL_MARGIN", 0.1)
    firm = new_firm(2, 1, deaf, graceful_timeout=0.1).open()
    before = firm.pids()[0]
    assert firm.pool.retire(0, "it hangs", replace_first=False)
    firm.until(lambda: firm.pids()[0] not in (0, before))
    assert firm.shared.header.deaths == 0


def test_one_that_dies_before_it_is_told_is_replaced_by_the_one_that_boots(
    new_firm: NewFirm,
) -> None:
    firm = new_firm(3, 2).open()
    assert firm.pool.retire(0, "a call hangs", replace_first=True)
    os.kill(firm.pids()[0], signal.SIGKILL)
    firm.until(lambda: firm.pids()[0] == 0)
    firm.until(lambda: firm.pool.workers[2].ready)
    assert firm.pids()[0] == 0
    assert firm.pool.workers[0].generation is None


def test_a_replacement_that_dies_while_it_boots_is_tried_again(new_firm: NewFirm) -> None:
    firm = new_firm(3, 2).open()
    old = firm.pids()[0]
    assert firm.pool.retire(0, "a call hangs", replace_first=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(firm.pids()[2], signal.SIGKILL)
    firm.until(lambda: firm.pids()[0] != old)
    firm.until(lambda: firm.pool.workers[2].ready)


def test_a_worker_of_a_new_generation_that_dies_fails_the_generation(new_firm: NewFirm) -> None:
    firm = new_firm(3, 2, slow)
    firm.pool.spawn(firm.generation)
    os.kill(firm.pids()[0], signal.SIGKILL)
    firm.until(lambda: firm.failed)
    assert firm.failed == ["worker 0 died at boot: killed by signal 9 (SIGKILL)"]
    firm.pool.end_input(firm.generation)
    firm.until(firm.pool.is_gone)
    assert firm.shared.header.deaths == 0


def test_a_worker_more_is_refused_while_no_seat_is_free(new_firm: NewFirm) -> None:
    firm = new_firm(4, 1).open()
    exiting = Generation(2, firm.generation.settings, [], firm.generation.log)
    for worker in firm.pool.workers[1:]:
        worker.generation = exiting
    assert not firm.pool.add(firm.generation)
    assert firm.generation.wanted == 1
    firm.pool.workers[3].free()
    assert firm.pool.add(firm.generation)
    assert firm.pids()[3]
    exiting.close()
