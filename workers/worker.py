"""One worker process: boot, serve, exit.

Everything here runs in the worker process, in its main thread. It imports the modules, as far as
the template that it was forked from has not, and reports ready. From then on the main thread only
watches (`main_thread.py`), and client threads run everything else.
"""

import gc
import logging
import os
import sys
from typing import NoReturn

from cpanbridge.supervisor.processes.context import WorkerContext, send_report
from cpanbridge.workers import boot
from cpanbridge.workers.main_thread import MainThread
from cpanbridge.workers.modules import builtin
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError
from cpanbridge.workers.modules.orphans import end_with_master
from cpanbridge.workers.modules.registry import Registry
from cpanbridge.workers.service import Service

LOGGER = logging.getLogger("cpanbridge.worker")

# After so long a thread that computes gives the interpreter lock to others that ask for it, having
# waited for something. With Python's own 5 ms a quick call beside slow ones takes many times as
# long.
SWITCH_SECONDS = 0.0005


def run(context: WorkerContext) -> NoReturn:
    """Be a worker. Called in the child, right after the fork; ends the process."""

    def work() -> int:
        boot.set_up(context, _boot_title(context))
        return _work(context, Loader(context.settings, builtin.NAMES))

    boot.run_and_exit(f"Worker {context.slot}", work)


def run_forked(context: WorkerContext, loader: Loader, parent: int) -> NoReturn:
    """Be a worker that a template has forked, with what that has loaded; ends the process.

    `parent` is a pidfd of the process between the two.
    """

    def work() -> int:
        boot.set_up_forked(context, _boot_title(context), parent)
        return _work(context, loader)

    boot.run_and_exit(f"Worker {context.slot}", work)


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
    service = Service(context, registry)
    main_thread = MainThread(context, service, registry)
    end_with_master(False)  # from now on it finishes what it runs
    send_report(context.report, None)
    os.close(context.report)
    main_thread.watch()
    return 1 if service.broken else 0


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
