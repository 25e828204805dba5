r"""Replies: one JSON object each, which the framed form sends after its length (see framing.py).

In the one-shot form replies are pure ASCII (`to_ascii`), because deployed clients decode them
twice.
"""

import platform
import time
from json.encoder import encode_basestring_ascii
from typing import Any

import msgspec

from cpanbridge.supervisor.system.log_text import printable
from cpanbridge.supervisor.version import __version__
from cpanbridge.workers.protocol import results
from cpanbridge.workers.protocol.framing import MAX_FRAME
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request

PYTHON_VERSION = platform.python_version()


class _ExecutionInfo(msgspec.Struct):
    """How a call went. `timestamp` is Unix time in seconds when the reply was made."""

    daemon_version: str
    python_version: str
    timestamp: float
    duration_ms: float
    worker: int


class _Success(msgspec.Struct):
    """The reply to a call that returned. A struct takes half of a dict's time to encode."""

    result: Any
    module: str
    function: str
    request_id: str | None
    execution_info: _ExecutionInfo
    success: bool = True


_DAEMON_INFO = {"version": __version__, "python_version": PYTHON_VERSION}


def encode_success(
    request: Request, result: object, duration_ms: float, worker: int, *, lenient: bool = False
) -> bytes:
    """The reply with a function's result.

    JSON's own types as they are; dates and times as ISO 8601, Decimal, UUID and paths as strings,
    bytes as base64, sequences and sets as arrays, mappings and dataclasses as objects. Raises
    Refusal (UnencodableResult) for what has no exact JSON form, with its path. With `lenient` NaN
    and infinities become null, keys are not compared, and any other object becomes `str(object)`.
    """
    info = _ExecutionInfo(__version__, PYTHON_VERSION, time.time(), duration_ms, worker)
    reply = _Success(result, request.module, request.function, request.request_id, info)
    try:
        if lenient:
            encoded, fault = results.encode_leniently(reply), None
        else:
            encoded = results.encode(reply)
            nulls = encoded.count(b"null") - (request.request_id is None)
            fault = results.lost_in(result, has_null=nulls > 0)
    except BaseException as error:  # classes of the module may raise anything
        fault = results.explain(result, error)
    else:
        if fault is None and len(encoded) <= MAX_FRAME:
            return encoded
    problem = f"cannot be encoded as JSON: {fault}" if fault else f"is over {MAX_FRAME} bytes"
    message = f"Result of {request.module}.{request.function} {problem}"
    raise Refusal("UnencodableResult", message, request.request_id)


def encode_failure(refusal: Refusal, traceback: str | None = None) -> bytes:
    """The reply that says what went wrong. Lone surrogates in the texts are shown escaped."""
    reply: dict[str, object] = {
        "error": printable(refusal.message),
        "error_type": refusal.kind,
        "request_id": refusal.request_id,
        "daemon_info": _DAEMON_INFO,
        "success": False,
    }
    if traceback is not None:
        reply["traceback"] = printable(traceback)
    if refusal.retry_after is not None:
        reply["retry_after"] = refusal.retry_after
    return results.encode(reply)


def to_ascii(reply: bytes) -> bytes:
    r"""The same JSON with every character beyond ASCII as `\uXXXX`."""
    if reply.isascii():
        return reply
    # The standard library escapes in C. It escapes backslashes and quotes as well, which are JSON's
    # own here, so both are put back. In this order each pair becomes what it was.
    escaped = encode_basestring_ascii(reply.decode())[1:-1]
    return escaped.replace("\\\\", "\\").replace('\\"', '"').encode()
