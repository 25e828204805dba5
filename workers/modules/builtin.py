"""The modules `test` and `system`, which every daemon has.

Their functions receive the request itself, so that `echo` can tell `[5]` from `5`, and the client
socket, for the client's credentials.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups, wake_main_threads
from cpanbridge.supervisor.reports import connections, health, reports
from cpanbridge.supervisor.version import __version__
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules.registry import Exposed
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.replies import PYTHON_VERSION
from cpanbridge.workers.protocol.requests import Request

NAMES = ("test", "system")
_CLEANUP_SECONDS = 2.0  # for all workers to close their stale connections


def built_in(
    shared: Shared,
    settings: Settings,
    modules: Callable[[], list[str]],
    wakeups: Sequence[Wakeups] = (),
    wake_master: int = -1,
) -> dict[str, Exposed]:
    """Both modules, for this daemon. `modules` returns the names of all modules exposed.

    `wakeups` are those of all slots, `wake_master` is an eventfd; without them the functions may be
    listed, but not called.
    """

    def ping(request: Request, _: ClientSocket) -> dict[str, Any]:
        return {
            "message": "pong",
            "daemon_version": __version__,
            "python_version": PYTHON_VERSION,
            "platform": platform.platform(),
            "uptime": shared.uptime,
            "stats": reports.counted(shared),
            "input": request.params,
        }

    def echo(request: Request, _: ClientSocket) -> Any:
        return request.params

    def shutdown() -> dict[str, Any]:
        # Not by a signal: this process's parent need not be the master, after an upgrade.
        shared.header.stop_requested = 1
        os.eventfd_write(wake_master, 1)
        return {"message": "The daemon is shutting down"}

    health_report = _plain(lambda: health.health(shared, settings))
    stats_report = _plain(lambda: reports.stats(shared, settings))
    test = {"ping": ping, "echo": echo, "health": health_report, "stats": stats_report}
    system = {
        "info": _plain(lambda: reports.info(shared, settings, modules())),
        "health": health_report,
        "performance": _plain(lambda: health.performance(shared, settings)),
        "connections": _plain(lambda: connections.connections(shared, settings)),
        "metrics": _plain(lambda: reports.metrics(shared, settings, modules())),
        "stats": stats_report,
        "cleanup": _plain(lambda: _clean_up(shared, settings, wakeups), for_owner=True),
        "shutdown": _plain(shutdown, for_owner=True),
    }
    return {
        "test": Exposed(test, None, takes_request=True, ping="ping"),
        "system": Exposed(system, None, takes_request=True),
    }


def _plain(
    function: Callable[[], Any], *, for_owner: bool = False
) -> Callable[[Request, ClientSocket], Any]:
    """A function without params; `for_owner`: for the daemon's own user and root only."""

    def checked(request: Request, client: ClientSocket) -> Any:
        name = f"{request.module}.{request.function}"
        if request.params:
            message = f"Invalid params for {name}: it takes none"
            raise Refusal("InvalidParams", message, request.request_id)
        uid = client.credentials().uid if for_owner else 0
        if uid not in (0, os.geteuid()):
            message = f"{name} is for the daemon's own user and root, not for uid {uid}"
            raise Refusal("PermissionDenied", message, request.request_id, request.perl_caller)
        return function()

    return checked


def _clean_up(shared: Shared, settings: Settings, wakeups: Sequence[Wakeups]) -> dict[str, Any]:
    """Have all workers close their stale connections; wait until they have, but not for long."""
    stale = connections.stale_connections(shared, settings)
    details = [connections.describe_connection(each, settings) for each in stale]
    shared.lock.run(shared.request_cleanup)
    wake_main_threads(shared, wakeups)
    until = time.monotonic() + _CLEANUP_SECONDS
    left = {each.id for each in stale}
    while left and time.monotonic() < until:
        time.sleep(0.005)
        left &= {each.id for each in connections.stale_connections(shared, settings)}
    return {
        "cleaned_connections": len(stale) - len(left),
        "connections_details": [each for each in details if each["connection_id"] not in left],
        "remaining_connections": shared.connections(),
    }
