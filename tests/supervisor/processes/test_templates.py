"""Templates, with real processes that import nothing."""

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
from conftest import close_wakeups

from cpanbridge.supervisor.config import Limits, Module, Settings
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
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
    """Imports, and never forks."""
    tell_imports(context.commands, Imports(shared=1))
    time.sleep(60)


def losing(context: TemplateContext) -> None:
    """Forks workers that die when they have sent their pid."""
    tell_imports(context.commands, Imports(shared=1))
    while (command := receive_command(context.commands)) is not None:
        _, report = command

        def main(report: int = report) -> None:
            with contextlib.suppress(BrokenPipeError):  # the test is over
                os.write(report, str(os.getpid()).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        fork_twice(report, main)


def sparing(context: TemplateContext) -> None:
    """Receives the first command, and ends without a fork."""
    tell_imports(context.commands, Imports(shared=1))
    receive_command(context.commands)
    os._exit(3)


def finding_fault(context: TemplateContext) -> None:
    """Finds another module unfit each time."""
    number = len(context.kept_out)
    tell_imports(context.commands, Imports(unfit={f"m{number}": "it starts a thread"}))
    time.sleep(60)


def hanging_in_an_import(context: TemplateContext) -> None:
    for name in ("m", "n"):
        tell_imports(context.commands, Imports(importing=f"modules.{name}"))
    time.sleep(60)


def sharing_nothing(context: TemplateContext) -> None:
    tell_imports(context.commands, Imports(shared=0))
    time.sleep(60)


def failing(context: TemplateContext) -> None:
    tell_imports(context.commands, Imports(error="m: import of 'm' failed"))
    os._exit(0)


class Setup:
    """A worker pool and its owner."""

    def __init__(self, template: TemplateMain) -> None:
        self.loop = Loop()
        self.shared = Shared.create(4, Limits(), used=2)
        wakeups = [Wakeups.create() for _ in range(4)]
        weakref.finalize(self, close_wakeups, wakeups)
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
        self.pool.end(generation)

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

    def open(self) -> "Setup":
        self.pool.spawn(self.generation)
        self.until(lambda: self.generation.in_service)
        return self

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pool.workers if worker.pid]


NewSetup = Callable[[TemplateMain], Setup]


@pytest.fixture
def new_setup() -> Iterator[NewSetup]:
    setups: list[Setup] = []

    def make(template: TemplateMain) -> Setup:
        setups.append(Setup(template))
        return setups[-1]

    yield make
    for setup in setups:
        setup.pool.stop(None)
        setup.until(setup.pool.is_gone)
    del setup
    setups.clear()
    gc.collect()  # descriptors are closed now, not in the midst of another test
    # A master is a subreaper; the process of the tests must not stay one.
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
        return int(stream.read().rpartition(")")[2].split()[1])


def test_workers_are_forked_by_the_template_and_are_the_masters_children(
    new_setup: NewSetup,
) -> None:
    setup = new_setup(obedient).open()
    assert len(setup.template_pids) == 1
    assert [parent(pid) for pid in setup.pids()] == [os.getpid()] * 2
    assert [setup.shared.slots[slot].pid for slot in (0, 1)] == setup.pids()
    victim = setup.pids()[0]
    os.kill(victim, signal.SIGKILL)
    setup.until(lambda: victim not in setup.pids() and all(s.ready for s in setup.pool.workers[:2]))
    assert setup.shared.header.deaths == 1


def test_a_template_that_hangs_fails_its_generation(
    new_setup: NewSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.spawner.BOOT_SECONDS", 0.2)
    setup = new_setup(hanging)
    setup.pool.spawn(setup.generation)
    setup.until(lambda: setup.failed)
    said = "the template died at boot: not ready after 0.2 s; the log shows what it was at"
    assert setup.failed == [said]
    assert setup.pids() == setup.template_pids == []


def test_a_template_that_hangs_in_an_import_names_the_module(
    new_setup: NewSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.spawner.BOOT_SECONDS", 2.0)
    setup = new_setup(hanging_in_an_import)
    setup.pool.spawn(setup.generation)
    setup.until(lambda: setup.failed)
    said = "modules.n: not imported after 2 s; the log shows what it was at"
    assert setup.failed == [said]


def test_a_template_that_is_killed_at_boot_fails_its_generation(new_setup: NewSetup) -> None:
    setup = new_setup(hanging)
    setup.pool.spawn(setup.generation)
    os.kill(setup.template_pids[0], signal.SIGKILL)
    setup.until(lambda: setup.failed)
    assert setup.failed == ["the template died at boot: killed by signal 9 (SIGKILL)"]


def test_an_import_that_fails_in_the_template_fails_its_generation(new_setup: NewSetup) -> None:
    setup = new_setup(failing)
    setup.pool.spawn(setup.generation)
    setup.until(lambda: setup.failed and setup.pool.is_gone())
    assert setup.failed == ["m: import of 'm' failed"]


def test_a_generation_that_is_given_up_ends_its_template(new_setup: NewSetup) -> None:
    setup = new_setup(hanging)
    setup.pool.spawn(setup.generation)
    setup.pool.end(setup.generation)
    setup.until(setup.pool.is_gone)
    assert setup.failed == []


@pytest.mark.parametrize("template", [finding_fault, sharing_nothing])
def test_where_nothing_can_be_shared_the_master_forks_the_workers(
    new_setup: NewSetup, template: TemplateMain
) -> None:
    setup = new_setup(template).open()
    setup.until(lambda: not setup.template_pids)
    assert len(setup.pids()) == 2
    assert setup.failed == []


@pytest.mark.parametrize("template", [deaf, sparing])
def test_the_master_forks_the_workers_that_a_template_does_not(
    new_setup: NewSetup, template: TemplateMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpanbridge.supervisor.processes.worker_process._FORK_SECONDS", 0.2)
    setup = new_setup(template).open()
    setup.until(lambda: not setup.template_pids)
    assert len(setup.pids()) == 2
    assert setup.shared.header.deaths == 0


def test_a_worker_that_dies_before_the_master_knows_it_is_not_waited_for_in_vain(
    new_setup: NewSetup,
) -> None:
    setup = new_setup(losing)
    setup.pool.spawn(setup.generation)
    setup.until(lambda: setup.failed)
    assert setup.failed[0].endswith("died at boot: killed by signal 9 (SIGKILL)")


def test_a_worker_that_has_ended_before_its_pid_was_read_is_known_to_have_ended(
    new_setup: NewSetup,
) -> None:
    setup = new_setup(losing)
    setup.pool.spawn(setup.generation)
    setup.until(lambda: any(worker.fork_requested for worker in setup.pool.workers))
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # the template lives: it is a worker
    setup.wait_for_children()
    assert any(worker.fork_requested for worker in setup.pool.workers)
    setup.until(lambda: setup.failed)
    assert setup.failed[0].endswith("died at boot: killed by signal 9 (SIGKILL)")


def test_a_worker_that_is_not_needed_any_more_ends_before_it_has_begun(new_setup: NewSetup) -> None:
    setup = new_setup(obedient)
    setup.pool.spawn(setup.generation)
    setup.until(lambda: any(worker.fork_requested for worker in setup.pool.workers))
    setup.pool.stop(None)
    setup.until(setup.pool.is_gone)
    with contextlib.suppress(ChildProcessError):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            os.waitpid(-1, 0)  # until there is none
    assert time.monotonic() < until
    assert setup.pids() == []


def test_while_another_master_takes_over_no_worker_boots(new_setup: NewSetup) -> None:
    setup = new_setup(obedient).open()
    os.kill(setup.pids()[0], signal.SIGKILL)
    worker = setup.pool.workers[0]
    setup.until(lambda: worker.fork_requested)
    setup.pool.standing_still = True
    setup.until(lambda: not worker.fork_requested)
    assert worker.pid == 0
    setup.pool.standing_still = False
    setup.until(lambda: worker.ready)
