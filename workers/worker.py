"""One worker process: boot, serve, exit.

Its main thread imports the modules, as far as the template that it was forked from has not, and
reports ready. From then on it only watches (`main_thread.py`), and client threads run everything
else.
"""

import gc
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from cpanbridge.supervisor.processes.context import WorkerContext, report_import, send_report
from cpanbridge.workers import boot
from cpanbridge.workers.main_thread import MainThread
from cpanbridge.workers.modules import builtin
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError
from cpanbridge.workers.modules.registry import Registry
from cpanbridge.workers.service import Service

LOGGER = logging.getLogger("cpanbridge.worker")

# How long a thread that computes keeps the interpreter lock once another thread asks for it. With
# Python's own 5 ms a quick call beside slow ones takes many times as long.
SWITCH_SECONDS = 0.0005


def run(context: WorkerContext) -> NoReturn:
    """Be a worker. Called in the child, right after the fork; ends the process."""
    _run(context, lambda title: boot.set_up(context, title), None)


def run_forked(context: WorkerContext, loader: Loader, parent: int) -> NoReturn:
    """Be a worker that a template has forked, with what that has loaded; ends the process.

    `parent` is a pidfd of the process between the two.
    """
    _run(context, lambda title: boot.set_up_forked(context, title, parent), loader)


def _run(context: WorkerContext, set_up: Callable[[str], None], loader: Loader | None) -> NoReturn:
    def work() -> int:
        set_up(f"worker {context.slot} gen {context.generation} boots")
        return _work(context, loader or Loader(context.settings, builtin.NAMES))

    boot.run_and_exit(f"Worker {context.slot}", work)


def _work(context: WorkerContext, loader: Loader) -> int:
    """Boot and serve; the exit status."""
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        registry = _boot(context, loader)
    except ModuleLoadError as error:
        send_report(context.report, str(error))
        return 1
    service = Service(context, registry)
    main_thread = MainThread(context, service, registry)
    boot.end_with_master(False)  # from now on it finishes what it runs
    send_report(context.report, None)
    os.close(context.report)
    main_thread.watch()
    return 1 if service.broken else 0


def _boot(context: WorkerContext, loader: Loader) -> Registry:
    names: list[str] = []
    built_in = builtin.built_in(
        context.shared, context.settings, lambda: names, context.wakeups, context.wake_master
    )
    loader.on_import = partial(report_import, context.report)
    registry = loader.load(built_in)
    names.extend(sorted(registry.exposed))
    for name, reason in registry.left_out.items():
        LOGGER.warning("Worker %d: module %s is left out: %s", context.slot, name, reason)
    # What is loaded now stays; the collector need not visit it again and again.
    gc.collect()
    gc.freeze()
    return registry
