"""The floor's work as a WSGI application: decode JSON, call echo, encode JSON.

Runs under gunicorn and uWSGI, in the environment of `peerenv.py`.
"""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import msgspec

PYTHON_VERSION = platform.python_version()

encode = msgspec.json.encode
decode = msgspec.json.decode


def echo(**params: object) -> dict[str, object]:
    """Return the keyword arguments."""
    return params


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> list[bytes]:
    """Answer one call with the fields of the daemon's success reply."""
    request = decode(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    started = time.perf_counter()
    result = echo(**request["params"])
    reply = encode(
        {
            "success": True,
            "result": result,
            "module": request["module"],
            "function": request["function"],
            "request_id": request.get("request_id"),
            "execution_info": {
                "daemon_version": "0.0.0",
                "python_version": PYTHON_VERSION,
                "timestamp": time.time(),
                "duration_ms": (time.perf_counter() - started) * 1000,
                "worker": os.getpid(),
            },
        }
    )
    start_response(
        "200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(reply)))]
    )
    return [reply]
