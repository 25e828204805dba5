"""Templates, with real processes that only pretend to import."""

import contextlib
import ctypes
import gc
import os
import select
import signal
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from conftest import take_down

from cpanbridge.supervisor.config import Limits, Module, Settings
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.context import (
    Imports,
    Mains,
    TemplateContext,
    WorkerContext,
    receive_command,
    send_report,
    tell_imports,
    wait_to_begin,
)
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.logs import LogSettings

PR_SET_CHILD_SUBREAPER = 36
TemplateMain = Callable[[TemplateContext], None]


def serve(context: WorkerContext) -> None:
    """Be a worker: boot, and stay until the master is gone."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    send_report(context.report, None)
    select.select([context.lifeline], [], [], 60)
    os._exit(0)


def fork_twice(report: int, main: Callable[[], None]) -> None:
    """As a template does."""
    between = os.fork()
    if between == 0:
        handle = os.pidfd_open(os.getpid())
        if os.fork() == 0:
            select.select([handle], [], [])
            main()
        os._exit(0)
    os.waitpid(between, 0)
    os.close(report)


def obedient(context: TemplateContext) -> None:
    """Forks workers that boot."""
    tell_imports(context.commands, Imports(shared=1))
    while (command := receive_command(context.commands)) is not None:
        slot, report = command

        def main(slot: int = slot, report: int = report) -> None:
            if wait_to_begin(report):
                serve(context.worker._replace(slot=slot, report=report))
            os._exit(0)

        fork_twice(report, main)
    os._exit(0)


def hanging(_: TemplateContext) -> None:
    """Never comes to an end of its imports."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    time.sleep(60)


def deaf(context: TemplateContext) -> None:
    """Imports, and forks nobody."""
    tell_imports(context.commands, Imports(shared=1))
    time.sleep(60)


def losing(context: TemplateContext) -> None:
    """Forks workers that die when they have said who they are."""
    tell_imports(context.commands, Imports(shared=1))
    while (command := receive_command(context.commands)) is not None:
        _, report = command

        def main(report: int = report) -> None:
            with contextlib.suppress(BrokenPipeError):  # the test is over
                os.write(report, str(os.getpid()).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        fork_twice(report, main)


def sparing(context: TemplateContext) -> None:
    """Forks nobody at the first order, but takes it."""
    tell_imports(context.commands, Imports(shared=1))
    receive_command(context.commands)
    os._exit(3)


def finding_fault(context: TemplateContext) -> None:
    """Finds another module unfit each time."""
    number = len(context.kept_out)
    tell_imports(context.commands, Imports(unfit={f"m{number}": "it starts a thread"}))
    time.sleep(60)


def sharing_nothing(context: TemplateContext) -> None:
    tell_imports(context.commands, Imports(shared=0))
    time.sleep(60)


def failing(context: TemplateContext) -> None:
    tell_imports(context.commands, Imports(error="m: import of 'm' failed"))
    os._exit(0)


class Firm:
    """A workforce and whoever owns it."""

    def __init__(self, template: TemplateMain) -> None:
        self.loop = Loop()
        self.shared = Shared.create(4, Limits(), used=2)
        wakeups = [Wakeups.hang() for _ in range(4)]
        weakref.finalize(self, take_down, wakeups)
        mains = Mains(serve, template)
        self.pool = WorkerPool(self, self.loop, self.shared, wakeups, mains)
        modules = {"m": Module(import_="m", functions="*")}
        self.generation = Generation(
            1,
            Settings(workers=2, modules=modules),
            [],
            LogSettings("stderr", "-", "text", False),
        )
        self.failed: list[str] = []

    def generation_ready(self, generation: Generation) -> None:
        self.pool.put_in_service(generation)

    def generation_failed(self, generation: Generation, reason: str) -> None:
        self.failed.append(reason)
        self.pool.end_input(generation)

    def worker_gone(self) -> None:
        pass

    def wait_for_children(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.pool.ended(*ended)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            self.wait_for_children()
            self.loop.after(0.01, lambda: None)
            self.loop.turn()

    @property
    def template_pids(self) -> list[int]:
        return [each.pid for each in self.pool.templates.alive]

    def open(self) -> "Firm":
        self.pool.spawn(self.generation)
        self.until(lambda: self.generation.in_service)
        return self

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pool.workers if worker.pid]


NewFirm = Callable[[TemplateMain], Firm]


@pytest.fixture
def new_firm() -> Iterator[NewFirm]:
    firms: list[Firm] = []

    def make(template: TemplateMain) -> Firm:
        firms.append(Firm(template))
        return firms[-1]

    yield make
    for firm in firms:
        firm.pool.stop(None)
        firm.until(firm.pool.is_gone)
    del firm
    firms.clear()
    gc.collect()  # descriptors are closed now, not in the midst of another test
    # A master adopts what its descendants leave; the process of the tests must not go on so.
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
        return int(stream.read().rpartition(")")[2].split()[1])


def test_workers_are_forked_by_the_template_and_are_the_masters_children(
    new_firm: NewFirm,
) -> None:
    firm = new_firm(obedient).open()
    assert len(firm.template_pids) == 1
    assert [parent(pid) for pid in firm.pids()] == [os.getpid()] * 2
    assert [firm.shared.slots[slot].pid for slot in (0, 1)] == firm.pids()
    victim = firm.pids()[0]
    os.kill(victim, signal.SIGKILL)
    firm.until(lambda: victim not in firm.pids() and all(s.ready for s in firm.pool.workers[:2]))
    assert firm.shared.header.deaths == 1


def test_a_template_that_hangs_fails_its_generation(
    new_firm: NewFirm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.templates.BOOT_SECONDS", 0.2)
    firm = new_firm(hanging)
    firm.pool.spawn(firm.generation)
    firm.until(lambda: firm.failed)
    said = "the template died at boot: not ready after 0.2 s; the log shows what it was at"
    assert firm.failed == [said]
    assert firm.pids() == firm.template_pids == []


def test_a_template_that_is_killed_at_boot_fails_its_generation(new_firm: NewFirm) -> None:
    firm = new_firm(hanging)
    firm.pool.spawn(firm.generation)
    os.kill(firm.template_pids[0], signal.SIGKILL)
    firm.until(lambda: firm.failed)
    assert firm.failed == ["the template died at boot: killed by signal 9 (SIGKILL)"]


def test_what_a_template_says_of_a_module_fails_its_generation(new_firm: NewFirm) -> None:
    firm = new_firm(failing)
    firm.pool.spawn(firm.generation)
    firm.until(lambda: firm.failed and firm.pool.is_gone())
    assert firm.failed == ["m: import of 'm' failed"]


def test_a_generation_that_is_given_up_ends_its_template(new_firm: NewFirm) -> None:
    firm = new_firm(hanging)
    firm.pool.spawn(firm.generation)
    firm.pool.end_input(firm.generation)
    firm.until(firm.pool.is_gone)
    assert firm.failed == []


@pytest.mark.parametrize("template", [finding_fault, sharing_nothing])
def test_where_nothing_can_be_shared_the_master_forks_the_workers(
    new_firm: NewFirm, template: TemplateMain
) -> None:
    firm = new_firm(template).open()
    firm.until(lambda: not firm.template_pids)
    assert len(firm.pids()) == 2
    assert firm.failed == []


@pytest.mark.parametrize("template", [deaf, sparing])
def test_the_master_forks_the_workers_that_a_template_does_not(
    new_firm: NewFirm, template: TemplateMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.worker_process._BIRTH_SECONDS", 0.2)
    firm = new_firm(template).open()
    firm.until(lambda: not firm.template_pids)
    assert len(firm.pids()) == 2
    assert firm.shared.header.deaths == 0


def test_a_worker_that_dies_before_the_master_knows_it_is_not_waited_for_in_vain(
    new_firm: NewFirm,
) -> None:
    firm = new_firm(losing)
    firm.pool.spawn(firm.generation)
    firm.until(lambda: firm.failed)
    assert firm.failed[0].endswith("died at boot: killed by signal 9 (SIGKILL)")


def test_a_worker_that_has_ended_before_its_pid_was_heard_is_known_to_have_ended(
    new_firm: NewFirm,
) -> None:
    firm = new_firm(losing)
    firm.pool.spawn(firm.generation)
    firm.until(lambda: any(worker.unborn for worker in firm.pool.workers))
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # the template lives: it is a worker
    firm.wait_for_children()
    assert any(worker.unborn for worker in firm.pool.workers)
    firm.until(lambda: firm.failed)
    assert firm.failed[0].endswith("died at boot: killed by signal 9 (SIGKILL)")


def test_a_worker_that_is_not_wanted_any_more_ends_before_it_has_begun(new_firm: NewFirm) -> None:
    firm = new_firm(obedient)
    firm.pool.spawn(firm.generation)
    firm.until(lambda: any(worker.unborn for worker in firm.pool.workers))
    firm.pool.stop(None)
    firm.until(firm.pool.is_gone)
    with contextlib.suppress(ChildProcessError):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            os.waitpid(-1, 0)  # until there is none
    assert time.monotonic() < until
    assert firm.pids() == []


def test_while_another_master_takes_over_nobody_begins(new_firm: NewFirm) -> None:
    firm = new_firm(obedient).open()
    os.kill(firm.pids()[0], signal.SIGKILL)
    worker = firm.pool.workers[0]
    firm.until(lambda: worker.unborn)
    firm.pool.standing_still = True
    firm.until(lambda: not worker.unborn)
    assert worker.pid == 0
    firm.pool.standing_still = False
    firm.until(lambda: worker.ready)
