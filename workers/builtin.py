"""The modules `test` and `system`, which every daemon has.

Their functions are handed the request itself, so that `echo` can tell `[5]` from `5`.
"""

import platform
from collections.abc import Callable
from typing import Any

from cpanbridge.supervisor import reports
from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.shared import Shared
from cpanbridge.supervisor.version import __version__
from cpanbridge.workers.modules import Exposed
from cpanbridge.workers.protocol import PYTHON_VERSION, Refusal, Request


def built_in(
    shared: Shared, settings: Settings, modules: Callable[[], list[str]]
) -> dict[str, Exposed]:
    """Both modules, reporting on this daemon; `modules` tells the names of all that is exposed."""

    def ping(request: Request) -> dict[str, Any]:
        return {
            "message": "pong",
            "daemon_version": __version__,
            "python_version": PYTHON_VERSION,
            "platform": platform.platform(),
            "uptime": shared.uptime,
            "stats": reports.counts(shared),
            "input": request.params,
        }

    def echo(request: Request) -> Any:
        return request.params

    def info(request: Request) -> dict[str, Any]:
        _no_params(request)
        return reports.info(shared, settings, modules())

    def metrics(request: Request) -> dict[str, Any]:
        _no_params(request)
        return reports.metrics(shared, settings, modules())

    return {
        "test": Exposed({"ping": ping, "echo": echo}, None, takes_request=True),
        "system": Exposed({"info": info, "metrics": metrics}, None, takes_request=True),
    }


def _no_params(request: Request) -> None:
    if request.params:
        message = f"Invalid params for {request.module}.{request.function}: it takes none"
        raise Refusal("InvalidParams", message, request.request_id)
