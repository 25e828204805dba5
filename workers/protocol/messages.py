r"""Bytes to requests, replies to bytes. Nothing here touches a socket.

A request is one JSON object, decoded and checked against `Request` in one pass, but for its names:
what they may be is looked at when they are not found. The result has the values that the client
sent, never altered ones. A reply is one JSON object as well. In the framed form each has its length
before it, 4 bytes, big-endian; in the one-shot form replies are pure ASCII, because deployed
clients decode them twice.
"""

import json
import platform
import struct
import time
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii
from typing import Annotated, Any, NoReturn, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cpanbridge.supervisor.config import NAME_PATTERN, FunctionName, Limits, ModuleName
from cpanbridge.supervisor.system.log_text import printable
from cpanbridge.supervisor.version import __version__

PYTHON_VERSION = platform.python_version()
FRAME_HEADER = struct.Struct(">I")
# "No further request on this connection was or will be read."
NO_MORE_REQUESTS = FRAME_HEADER.pack(0)
MAX_FRAME = 2**32 - 1
# A frame's length is below 9 * 2**24 (see config.MAX_REQUEST_SIZE), so its first byte is lower.
FIRST_WHITE_SPACE = 9


RequestId = Annotated[str, Meta(max_length=100)]


# The deployed one-shot client: it says so of itself, and encodes its request's text twice.
DOUBLY_ENCODING_CLIENT = "2.00"


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends. Fields that may be absent may be null as well."""

    module: str
    function: str
    params: Any = None
    timestamp: float | None = None
    request_id: RequestId | None = None
    perl_caller: Annotated[str, Meta(max_length=200)] | None = None
    client_version: Annotated[str, Meta(max_length=50)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None


class _Names(msgspec.Struct):
    """A request's names, checked, which takes longer than all the rest of it."""

    module: ModuleName
    function: FunctionName


class Refusal(Exception):
    """A request is answered with an error of the daemon's own, without being run.

    `kind` becomes the reply's `error_type`, `message` its `error`.
    """

    retry_after: float | None = None  # seconds; of an Overloaded

    def __init__(
        self,
        kind: str,
        message: str,
        request_id: str | None = None,
        perl_caller: str | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.request_id = request_id
        self.perl_caller = perl_caller


class _Identity(msgspec.Struct):
    request_id: RequestId | None = None


_NAME_RULE = f"matching regex {NAME_PATTERN!r}"
_NAME_RULE_IN_WORDS = "of a letter, then letters, digits and _"
_decode_request = msgspec.json.Decoder(Request).decode
_check_names = msgspec.json.Decoder(_Names).decode
_decode_identity = msgspec.json.Decoder(_Identity).decode
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def decode(data: bytes | bytearray | memoryview, limits: Limits) -> Request:
    """The request in `data`, checked. Raises Refusal (InvalidRequest) that says what is wrong."""
    try:
        request = _decode_request(data)
        _check_names(data)
    except _DECODE_ERRORS as error:
        raise Refusal("InvalidRequest", _explain(error, data, limits), identity(data)) from None
    if request.client_version == DOUBLY_ENCODING_CLIENT:
        request = _decode_once_more(request, data)
    if request.params is not None:
        _check_limits(request, data, limits)
    return request


def decode_if_complete(data: bytes, limits: Limits) -> Request | None:
    """The request in `data` if it is a whole and valid one; None if more is needed to tell.

    Names are not checked: one that is exposed is a good one, and for any other one `decode` says
    what is wrong.
    """
    try:
        request = _decode_request(data)
    except _DECODE_ERRORS:
        return None
    if request.client_version == DOUBLY_ENCODING_CLIENT:
        request = _decode_once_more(request, data)
    if request.params is not None:
        _check_limits(request, data, limits)
    return request


def _decode_once_more(request: Request, data: bytes | bytearray | memoryview) -> Request:
    """The request of a client that encodes its text as UTF-8 twice.

    What cannot have been encoded twice was not, and stays as it is.
    """
    encoded = bytes(data)
    if encoded.isascii():
        return request
    try:
        return _decode_request(encoded.decode().encode("latin-1"))
    except (UnicodeError, *_DECODE_ERRORS):
        return request


def identity(data: bytes | bytearray | memoryview) -> str | None:
    """The `request_id` in a request's bytes, if they are whole and have one."""
    try:
        return _decode_identity(data).request_id
    except _DECODE_ERRORS:
        return None


def _explain(error: Exception, data: bytes | bytearray | memoryview, limits: Limits) -> str:
    if isinstance(error, RecursionError):
        return f"Invalid request: nested deeper than {limits.max_object_depth} levels"
    if isinstance(error, UnicodeDecodeError):
        return f"Invalid request: not UTF-8: {error.reason} at byte {error.start} of a string"
    if isinstance(error, msgspec.ValidationError):
        return f"Invalid request: {error}".replace(_NAME_RULE, _NAME_RULE_IN_WORDS)
    if "truncated" in str(error) and _is_json(data):
        # msgspec's word for half of a surrogate pair; the standard library lets it pass.
        return "Invalid request: a string has a lone surrogate, which is not a character"
    return f"Invalid request: not JSON: {error}"


def _is_json(data: bytes | bytearray | memoryview) -> bool:
    try:
        json.loads(bytes(data))
    except (ValueError, RecursionError):
        return False
    return True


# Where a value stands: the place that it is in, and its key there; None: it is `params`.
_Place: TypeAlias = "tuple[_Place, str | int] | None"


def _check_limits(request: Request, data: bytes | bytearray | memoryview, limits: Limits) -> None:
    if not (limits.max_string_length or limits.max_array_length or limits.max_param_count):
        text = bytes(data) if isinstance(data, memoryview) else data
        if _is_shallow(text, limits.max_object_depth):
            return
    if isinstance(request.params, dict | list | str):
        _check_value(request.params, request, limits)


_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'{}[]"')


def _is_shallow(text: bytes | bytearray, depth: int) -> bool:
    """Whether `params` in a valid request is nested no deeper than `depth` levels.

    Made of scans in C, since a walk over a large request takes ten times as long as decoding it.
    Of the valid text only the brackets are kept, all of one kind. Taking the innermost pairs away
    takes one level off everything, so nothing is left after as many times as there are levels.
    """
    if text.count(b"{") + text.count(b"[") <= depth:
        return True
    if b"\\" in text:  # from the left, as backslashes pair up
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = text.translate(_TO_BRACES, _NOT_STRUCTURE).replace(b'""', b"")
    if b'"' in structure:  # some string has brackets in it: leave out what stands in quotes
        outside = b"".join(text.split(b'"')[::2])
        structure = outside.translate(_TO_BRACES, _NOT_STRUCTURE)
    for _ in range(1 + depth):  # the request itself is one level
        structure = structure.replace(b"{}", b"")
        if not structure:
            return True
    return False


def _check_value(params: Any, request: Request, limits: Limits) -> None:
    """Refuse a value over a limit, with its path and the limit. Walks without recursion."""

    def refuse(context: _Place, what: str, limit: str) -> NoReturn:
        message = f"Invalid request: {_path(context)}: {what} (limits.{limit})"
        raise Refusal("InvalidRequest", message, request.request_id)

    if limits.max_param_count and isinstance(params, dict | list):
        count = len(params)
        if count > limits.max_param_count:
            what = f"{count} parameters, at most {limits.max_param_count} are allowed"
            refuse(None, what, "max_param_count")
    pending: list[tuple[_Place, Any, int]] = [(None, params, 1)]
    while pending:
        context, value, depth = pending.pop()
        if isinstance(value, str):
            if limits.max_string_length and len(value) > limits.max_string_length:
                what = f"{len(value)} characters, at most {limits.max_string_length} are allowed"
                refuse(context, what, "max_string_length")
            continue
        if depth > limits.max_object_depth:
            what = f"nested deeper than {limits.max_object_depth} levels"
            refuse(context, what, "max_object_depth")
        if isinstance(value, dict):
            items: Iterable[tuple[str | int, Any]] = value.items()
        else:
            if limits.max_array_length and len(value) > limits.max_array_length:
                what = f"{len(value)} items, at most {limits.max_array_length} are allowed"
                refuse(context, what, "max_array_length")
            items = enumerate(value)
        pending.extend(
            ((context, key), item, depth + 1)
            for key, item in items
            if isinstance(item, dict | list | str)
        )


def _path(context: _Place) -> str:
    """A place as `params.key[3]`; put together only when there is something to say of it."""
    steps = []
    while context is not None:
        context, key = context
        steps.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "params" + "".join(reversed(steps))


class ExecutionInfo(msgspec.Struct):
    """How a call went. `timestamp` is Unix time in seconds when the reply was made."""

    daemon_version: str
    python_version: str
    timestamp: float
    duration_ms: float
    worker: int


class Success(msgspec.Struct):
    """The reply to a call that returned."""

    result: Any
    module: str
    function: str
    request_id: str | None
    execution_info: ExecutionInfo
    success: bool = True


class DaemonInfo(msgspec.Struct):
    """Who answers, in a failure."""

    version: str = __version__
    python_version: str = PYTHON_VERSION


class Failure(msgspec.Struct):
    """The reply to a call that failed or was refused."""

    error: str
    error_type: str
    request_id: str | None
    daemon_info: DaemonInfo
    success: bool = False
    traceback: str | UnsetType = UNSET  # with `debug` on
    retry_after: float | UnsetType = UNSET  # seconds; of an Overloaded


_encode_reply = msgspec.json.Encoder(enc_hook=str).encode
_DAEMON_INFO = DaemonInfo()


def encode_success(request: Request, result: object, duration_ms: float, worker: int) -> bytes:
    """The reply with a function's result.

    JSON's own types as they are; dates and times as ISO 8601, Decimal and UUID as strings, bytes
    as base64, sets and tuples as arrays, dataclasses as objects, NaN and infinities as null, any
    other object as `str(object)`. Raises Refusal (UnencodableResult) for what has no JSON form.
    """
    info = ExecutionInfo(__version__, PYTHON_VERSION, time.time(), duration_ms, worker)
    reply = Success(result, request.module, request.function, request.request_id, info)
    try:
        encoded = _encode_reply(reply)
    except BaseException as error:  # str() of a foreign object may raise anything
        message = (
            f"Result of {request.module}.{request.function} cannot be encoded as JSON: "
            f"{type(error).__name__}: {message_of(error)}"
        )
        raise Refusal("UnencodableResult", message, request.request_id) from error
    if len(encoded) > MAX_FRAME:
        message = f"Result of {request.module}.{request.function} is over {MAX_FRAME} bytes"
        raise Refusal("UnencodableResult", message, request.request_id)
    return encoded


def message_of(error: BaseException) -> str:
    """What an exception says of itself, whatever its class does when it is asked."""
    try:
        return str(error)
    except BaseException:
        return "(its message cannot be shown)"


def encode_failure(
    message: str,
    kind: str,
    request_id: str | None,
    *,
    traceback: str | None = None,
    retry_after: float | None = None,
) -> bytes:
    """The reply that says what went wrong. Lone surrogates in it are shown escaped."""
    failure = Failure(printable(message), kind, request_id, _DAEMON_INFO)
    if traceback is not None:
        failure.traceback = printable(traceback)
    if retry_after is not None:
        failure.retry_after = retry_after
    return _encode_reply(failure)


def is_framed(data: bytes) -> bool:
    """Whether a client whose first bytes these are speaks the framed form."""
    return data[0] < FIRST_WHITE_SPACE


def whole_frame(data: bytes) -> bytes | None:
    """The first message in a framed client's bytes, if it is all there."""
    if len(data) < FRAME_HEADER.size:
        return None
    (length,) = FRAME_HEADER.unpack_from(data)
    end = FRAME_HEADER.size + length
    return data[FRAME_HEADER.size : end] if end <= len(data) else None


def first_frame(data: bytes) -> bytes:
    """The first message in a framed client's bytes, as far as it is there."""
    if len(data) < FRAME_HEADER.size:
        return b""
    (length,) = FRAME_HEADER.unpack_from(data)
    return data[FRAME_HEADER.size : FRAME_HEADER.size + length]


def to_ascii(reply: bytes) -> bytes:
    r"""The same JSON with every character beyond ASCII as `\uXXXX`."""
    if reply.isascii():
        return reply
    # The standard library's escapes are made in C. It escapes backslashes and quotes as well, but
    # these are JSON's own here, and are put back; in this order, each pair is what it was.
    escaped = encode_basestring_ascii(reply.decode())[1:-1]
    return escaped.replace("\\\\", "\\").replace('\\"', '"').encode()


def to_frame(reply: bytes) -> bytes:
    """The reply with its length before it."""
    return FRAME_HEADER.pack(len(reply)) + reply
