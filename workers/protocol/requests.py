"""Requests: one JSON object, decoded and checked against `Request` in one pass.

The result holds the values that the client sent, never altered ones.
"""

import contextlib
import json
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cpanbridge.supervisor.config import NAME_PATTERN, FunctionName, Limits, ModuleName
from cpanbridge.supervisor.wording import count_of
from cpanbridge.workers.protocol.param_limits import check_params
from cpanbridge.workers.protocol.refusal import Refusal

# The version by which the deployed one-shot client names itself. It encodes its requests as UTF-8
# twice.
_DOUBLY_ENCODING_CLIENT = "2.00"

_RequestId = Annotated[str, Meta(max_length=100)]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends. Fields that may be absent may be null as well.

    `module` and `function` are any strings here. Checking names against their pattern takes longer
    than all the rest of decoding, and a name that is found needs no check.
    """

    module: str
    function: str
    params: Any = None
    timestamp: float | None = None
    request_id: _RequestId | None = None
    perl_caller: Annotated[str, Meta(max_length=200)] | None = None
    client_version: Annotated[str, Meta(max_length=50)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None


class _Names(msgspec.Struct):
    """A request's names, with their pattern and length checked."""

    module: ModuleName
    function: FunctionName


class _Identity(msgspec.Struct):
    request_id: _RequestId | None = None


_NAME_RULE = f"matching regex {NAME_PATTERN!r}"
_NAME_RULE_IN_WORDS = "of a letter, then letters, digits and _"
_decode_request = msgspec.json.Decoder(Request).decode
_check_names = msgspec.json.Decoder(_Names).decode
_decode_identity = msgspec.json.Decoder(_Identity).decode
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def decode_request(data: bytes, limits: Limits) -> Request:
    """The request in `data`, with its names and limits checked.

    Raises Refusal (InvalidRequest) that says what is wrong.
    """
    try:
        request = _decode_request(data)
        _check_names(data)
    except _DECODE_ERRORS as error:
        message = _explain(error, data, limits)
        raise Refusal("InvalidRequest", message, request_id_in(data)) from None
    return _checked(request, data, limits)


def decode_if_complete(data: bytes, limits: Limits) -> Request | None:
    """The request in `data`; None when it is incomplete or invalid, which look alike here.

    Does not check names: a name that is exposed is valid, and for any other `decode_request` says
    what is wrong. Raises Refusal (InvalidRequest) when `params` are over a limit.
    """
    try:
        request = _decode_request(data)
    except _DECODE_ERRORS:
        return None
    return _checked(request, data, limits)


def _checked(request: Request, data: bytes, limits: Limits) -> Request:
    if request.client_version == _DOUBLY_ENCODING_CLIENT and not data.isascii():
        # Text that cannot have been encoded twice stays as it is.
        with contextlib.suppress(UnicodeError, *_DECODE_ERRORS):
            request = _decode_request(data.decode().encode("latin-1"))
    if request.params is not None:
        check_params(request.params, request.request_id, data, limits)
    return request


def request_id_in(data: bytes) -> str | None:
    """The `request_id` in a request's bytes; None when they are incomplete or have none."""
    try:
        return _decode_identity(data).request_id
    except _DECODE_ERRORS:
        return None


def _explain(error: Exception, data: bytes, limits: Limits) -> str:
    if isinstance(error, RecursionError):
        return f"Invalid request: nested deeper than {count_of(limits.max_object_depth, 'level')}"
    if isinstance(error, UnicodeDecodeError):
        return f"Invalid request: not UTF-8: {error.reason} at byte {error.start} of a string"
    if isinstance(error, msgspec.ValidationError):
        return f"Invalid request: {error}".replace(_NAME_RULE, _NAME_RULE_IN_WORDS)
    if "truncated" in str(error) and _is_json(data):
        # msgspec calls half of a surrogate pair truncated; the standard library accepts it.
        return "Invalid request: a string has a lone surrogate, which is not a character"
    return f"Invalid request: not JSON: {error}"


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
