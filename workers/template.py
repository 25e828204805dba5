"""A template: imports a generation's modules once, and forks workers that have them.

Everything here runs in the template process, which has one thread. It imports what can be shared,
says how that went, and waits for orders to fork a worker. It ends when the master closes its end of
their talk, or ends itself.
"""

import gc
import logging
import os
import signal
from contextlib import suppress
from typing import NoReturn

from cpanbridge.supervisor.place import (
    Imports,
    Place,
    TemplatePlace,
    hear_order,
    tell_imports,
)
from cpanbridge.workers import boot, builtin, worker
from cpanbridge.workers.forks import fork_worker
from cpanbridge.workers.loading import Loader, ModuleLoadError
from cpanbridge.workers.preload import end_children, preload

LOGGER = logging.getLogger("cpanbridge.worker")


def run(place: TemplatePlace) -> NoReturn:
    """Be a template. Called in the child, right after the fork; ends the process."""
    boot.run_to_the_end("The template", lambda: _serve(place))


def _serve(place: TemplatePlace) -> int:
    name = f"template gen {place.worker.generation}"
    boot.begin(place.worker, f"{name} imports")
    loader = Loader(place.worker.settings, builtin.NAMES)
    imports = _import_all(place, loader)
    if imports.error is not None or imports.unfit:
        end_children()  # nobody will use what modules have started here
        tell_imports(place.orders, imports)
        return 0
    # The collector writes to what it visits, and what is written to is shared no more.
    gc.collect()
    gc.freeze()
    boot.show_title(name)
    tell_imports(place.orders, imports)
    while (order := hear_order(place.orders)) is not None:
        slot, report = order
        _fork(place, loader, place.worker._replace(slot=slot, report=report))
        os.close(report)
    return 0


def _import_all(place: TemplatePlace, loader: Loader) -> Imports:
    try:
        return preload(loader, place.worker.settings, place.kept_out)
    except ModuleLoadError as error:
        return Imports(error=str(error))


def _fork(place: TemplatePlace, loader: Loader, worker_place: Place) -> None:
    """Fork a worker that is the master's child."""
    boot.flush_output()  # or the worker would write it as well
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = fork_worker()
        if pid == 0:
            _fork_again(place, loader, worker_place)
        with suppress(ChildProcessError):  # a module may have SIGCHLD ignored
            os.waitpid(pid, 0)
    except OSError as error:  # the report ends without a word, as the master sees
        LOGGER.error("The template cannot fork: %s", error.strerror)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _fork_again(place: TemplatePlace, loader: Loader, worker_place: Place) -> NoReturn:
    """Called between template and worker: this process ends, and the worker is the master's."""
    try:
        between = os.pidfd_open(os.getpid())
        if fork_worker() == 0:
            place.orders.close()
            worker.run_forked(worker_place, loader, between)
    finally:
        os._exit(1)
