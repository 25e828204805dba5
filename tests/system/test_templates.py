"""Templates: modules are imported once for all workers, where that does no harm."""

import os
import signal
import textwrap

import psutil
import pytest
from conftest import Daemon, NewDaemon, halt
from exposing import write_modules
from plain_client import until

HEAVY = """
TABLE = [[str(number)] for number in range(200_000)]
def size():
    return len(TABLE)
"""
SAYS_SHARED = "import os\nPID = os.getpid()\ndef pid():\n    return PID\n"
SAYS_PID = "import os\nprint('imported in', os.getpid())\ndef pid():\n    return os.getpid()\n"


def expose(daemon: Daemon, top: str = "workers = 2", **files: str) -> Daemon:
    """Have a daemon expose a folder with these modules, besides those of all tests."""
    dedented = {name: textwrap.dedent(text) for name, text in files.items()}
    folder = write_modules(daemon.folder / "helpers", **dedented)
    daemon.write_config(
        f"{top}\nlimits.max_requests_per_minute = 0\n"
        f'[[module_dirs]]\npath = "{folder}"\naffinity = "none"'
    )
    return daemon


def imported_in(daemon: Daemon) -> list[int]:
    """The processes that have imported `SAYS_PID`, in order."""
    lines = daemon.log().splitlines()
    return [int(line.split()[-1]) for line in lines if line.startswith("imported in")]


def settled_workers(daemon: Daemon, count: int) -> list[int]:
    """Wait until so many workers are ready; their process ids."""

    def serving() -> list[int]:
        pids = [each["pid"] for each in daemon.status()["workers"] if each.get("state") == "serves"]
        return pids if len(pids) == count else []

    pids: list[int] = until(serving, 40, f"{count} workers ready")
    return pids


def new_worker(daemon: Daemon) -> int:
    """Kill a worker; the process id of the one that replaces it."""
    before = settled_workers(daemon, 2)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: f"(pid {before[0]}) died" in daemon.log())
    (new,) = set(settled_workers(daemon, 2)) - set(before)
    return new


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memory(daemon: Daemon) -> int:
    """PSS of master, template and workers, in bytes."""
    pids = [daemon.pid, *daemon.workers(), *daemon.templates()]
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)


def test_a_heavy_module_is_in_memory_once(new_daemon: NewDaemon) -> None:
    with_it = expose(new_daemon(), "workers = 4", heavy=HEAVY).run()
    without = expose(new_daemon(), "workers = 4\npreload = false", heavy=HEAVY).run()
    assert without.templates() == []
    assert with_it.call("heavy", "size") == without.call("heavy", "size") == 200_000
    assert memory(with_it) < memory(without) / 2


def test_workers_are_the_masters_children_and_status_shows_the_template(
    new_daemon: NewDaemon,
) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    (template,) = daemon.templates()
    assert imported_in(daemon) == [template]
    assert daemon.call("says", "pid") in daemon.workers()
    assert len(daemon.workers()) == 2
    title = " ".join(psutil.Process(template).cmdline()).strip()
    assert title == "cpanbridged: template gen 1"
    status = daemon.command("status").stdout
    assert f"pid {template}: template gen 1 forks" in status
    assert status.count(str(template)) == 1
    # Master, template and workers: the memory limit is for all of them.
    until(lambda: daemon.metrics()["system_stats"]["processes"] == 4)


def test_a_later_worker_has_the_modules_of_its_generation_and_imports_nothing(
    new_daemon: NewDaemon,
) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    expose(daemon, says="def broken(:", new="raise ValueError")
    new = new_worker(daemon)
    (old,) = set(daemon.workers()) - {new}
    halt(old)
    assert daemon.call("says", "pid") == new
    os.kill(old, signal.SIGCONT)
    assert imported_in(daemon) == daemon.templates()


def test_a_template_ends_with_its_generation(new_daemon: NewDaemon) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    (first,) = daemon.templates()
    daemon.reload()
    until(lambda: len(daemon.templates()) == 1 and first not in daemon.templates())
    (second,) = daemon.templates()
    assert imported_in(daemon) == [first, second]
    assert daemon.stop() == 0
    assert not runs(second)


def test_a_template_ends_with_a_killed_master(new_daemon: NewDaemon) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    pids = [*daemon.templates(), *daemon.workers()]
    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: not any(map(runs, pids)), 30, "the end of all processes")


def test_when_a_template_is_killed_workers_import_by_themselves_until_the_next_reload(
    new_daemon: NewDaemon,
) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    (template,) = daemon.templates()
    os.kill(template, signal.SIGKILL)
    until(lambda: f"The template of generation 1 (pid {template}) died: killed" in daemon.log())
    new = new_worker(daemon)
    assert imported_in(daemon) == [template, new]
    assert daemon.templates() == []
    daemon.reload()
    assert imported_in(daemon)[2:] == daemon.templates()


def test_a_new_master_has_a_template_of_its_own(new_daemon: NewDaemon) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    (first,) = daemon.templates()
    daemon.upgrade()
    until(lambda: not runs(first))
    assert imported_in(daemon) == [first, *daemon.templates()]
    new = new_worker(daemon)
    assert new not in imported_in(daemon)
    assert daemon.stop() == 0


def test_workers_that_boot_in_a_template_s_child_end_with_a_killed_master(
    new_daemon: NewDaemon,
) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    begun = daemon.folder / "hangs"
    (daemon.folder / "slow.py").write_text(
        f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(600)\n"
    )
    text = daemon.config.read_text()
    daemon.replace_config(
        f'python_path = ["{daemon.folder}"]\n{text}\n'
        '[modules.slow]\nimport = "slow"\nfunctions = ["f"]\npreload = false\n'
    )
    os.kill(daemon.pid, signal.SIGHUP)
    until(begun.exists)
    pids = until(lambda: len(found := [*daemon.workers(), *daemon.templates()]) == 6 and found)
    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: not any(map(runs, pids)), 30, "the end of all processes")


UNFIT = {
    "it starts a thread": """
        import threading, time
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        def works():
            return threading.active_count() > 1
    """,
    "it starts a process": """
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        def works():
            return child.poll() is None
        def shutdown():
            child.kill()
    """,
    "it opens ": """
        import os
        stream = open(__file__)
        def works():
            return stream.read(1) and True
    """,
    "it maps memory that processes share": """
        import mmap
        memory = mmap.mmap(-1, 4096)
        def works():
            return True
    """,
    "unfit.numbers is a generator of random numbers": """
        import random
        numbers = random.Random()
        def works():
            return numbers.random() < 1
    """,
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_module_that_cannot_be_shared_is_imported_by_each_worker(
    new_daemon: NewDaemon, reason: str
) -> None:
    unfit = textwrap.dedent(UNFIT[reason]) + SAYS_PID
    daemon = expose(new_daemon(), unfit=unfit, shared=SAYS_SHARED, zealous="import unfit").run()
    said = "Module unfit is imported by each worker for itself: " + reason
    assert daemon.log().count(said) == 1
    workers = settled_workers(daemon, 2)
    assert set(workers) < set(imported_in(daemon))
    assert not set(daemon.templates()) & set(imported_in(daemon))
    assert daemon.call("unfit", "works")
    assert daemon.call("shared", "pid") == daemon.templates()[0]
    new = new_worker(daemon)
    assert new in imported_in(daemon)
    assert daemon.stop() == 0


def test_threads_that_end_before_a_fork_are_no_obstacle(new_daemon: NewDaemon) -> None:
    """Libraries that are made for forks have such threads, and start them again after a fork."""
    text = """
        import os, threading
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()

        def end():
            over.set()
            thread.join()

        os.register_at_fork(before=end)
        """
    daemon = expose(new_daemon(), threads=textwrap.dedent(text) + SAYS_PID).run()
    assert imported_in(daemon) == daemon.templates()
    assert daemon.call("threads", "pid") in settled_workers(daemon, 2)


def test_what_an_unfit_module_has_started_in_a_template_ends_with_it(
    new_daemon: NewDaemon,
) -> None:
    text = "import subprocess\nprint('started', subprocess.Popen(['sleep', '77']).pid)\n"
    daemon = expose(new_daemon(), unfit=text).run()
    started = [int(line.split()[1]) for line in daemon.log().splitlines() if "started" in line[:7]]
    assert len(started) == 3  # in a template, and in each worker
    until(lambda: not runs(started[0]))
    for pid in started[1:]:
        assert runs(pid)
        os.kill(pid, signal.SIGKILL)


def test_a_module_with_preload_off_is_imported_by_each_worker(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    (daemon.folder / "lone.py").write_text(SAYS_PID)
    daemon.write_config(
        f'workers = 2\npython_path = ["{daemon.folder}"]\n'
        '[modules.lone]\nimport = "lone"\nfunctions = ["pid"]\npreload = false'
    )
    daemon.run()
    assert len(daemon.templates()) == 1  # for the modules of all tests
    assert sorted(imported_in(daemon)) == sorted(daemon.workers())


def test_without_modules_that_can_be_shared_there_is_no_template(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    daemon.replace_config(
        f'listen = ["{daemon.path}"]\nlog_file = "{daemon.log_file}"\nworkers = 2\n'
        '[modules.file]\nimport = "unfit"\nfunctions = ["pid"]\n'
    )
    (daemon.folder / "unfit.py").write_text("stream = open(__file__)\n" + SAYS_PID)
    daemon.environment["PYTHONPATH"] = str(daemon.folder)
    daemon.run()
    until(lambda: daemon.templates() == [])
    assert daemon.call("file", "pid") in settled_workers(daemon, 2)
    daemon.reload()
    assert daemon.call("test", "echo", [1]) == [1]


def test_each_worker_has_random_numbers_of_its_own(new_daemon: NewDaemon) -> None:
    text = "import os, random\ndef number():\n    return [os.getpid(), random.random()]\n"
    daemon = expose(new_daemon(), numbers=text).run()
    numbers = []
    for pid in settled_workers(daemon, 2):
        halt(pid)  # so that the other one runs the call
        numbers.append(daemon.call("numbers", "number"))
        os.kill(pid, signal.SIGCONT)
    (first, one), (second, other) = numbers
    assert first != second
    assert one != other


def test_a_later_worker_writes_to_the_log_that_is_open_now(new_daemon: NewDaemon) -> None:
    daemon = expose(new_daemon(), says=SAYS_PID).run()
    old = daemon.folder / "d.log.1"
    daemon.log_file.rename(old)
    os.kill(daemon.pid, signal.SIGUSR1)
    until(lambda: "Logs reopened" in daemon.log())
    new = new_worker(daemon)
    with psutil.Process(new).oneshot():
        assert os.readlink(f"/proc/{new}/fd/2") == str(daemon.log_file)
    assert f"pid {new}" not in old.read_text()
    (template,) = daemon.templates()
    assert os.readlink(f"/proc/{template}/fd/2") == str(daemon.log_file)


INTERRUPTED = """
import logging, os, signal
with logging.getLogger("cpanbridge").handlers[0].lock:
    os.rename({log!r}, {log!r} + ".1")
    os.link({log!r} + ".1", {log!r})  # the others, which are not told, go on in the same file
    os.kill(os.getpid(), signal.SIGUSR1)
    FOUND = [os.readlink("/proc/self/fd/2")]
def logs():
    return [*FOUND, os.readlink("/proc/self/fd/2")]
"""


def test_the_log_is_reopened_when_nothing_is_interrupted_that_may_hold_a_lock(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon()
    log = str(daemon.log_file)
    top = "workers = 1\npreload = false"
    expose(daemon, top, interrupted=INTERRUPTED.format(log=log)).run()
    assert daemon.call("interrupted", "logs") == [f"{log}.1", log]
