"""One call from the shell: a client of the framed protocol. Called in the command."""

import socket
import struct
from typing import Any, BinaryIO

import msgspec

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.wording import explain

_HEADER = struct.Struct(">I")
_REPLY_SECONDS = 1.0  # for the daemon to report that a call took too long


class CallError(OperatorError):
    """A call was not made, or its reply is an error."""


class NotRunningError(CallError):
    """Nothing listens at the socket."""

    exit_status = 3


def call(path: str, module: str, function: str, params: Any, timeout: float) -> Any:
    """The function's result. Raises NotRunningError, CallError.

    `timeout` is in seconds: the daemon answers by then, and each step of the exchange may take a
    little longer.
    """
    request = {"module": module, "function": function, "params": params, "timeout": timeout}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout + _REPLY_SECONDS)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            text = f"not running: {path}: {explain(error)}; try cpanbridged start"
            raise NotRunningError(text) from None
        except OSError as error:
            raise CallError(f"{path}: {explain(error)}") from None
        try:
            body = msgspec.json.encode(request)
            connection.sendall(_HEADER.pack(len(body)) + body)
            with connection.makefile("rb") as replies:
                (length,) = _HEADER.unpack(_read(replies, _HEADER.size))
                if length == 0:
                    raise CallError("the daemon is shutting down; the call was not run")
                reply = msgspec.json.decode(_read(replies, length))
        except TimeoutError:
            raise CallError(f"no reply within {timeout:g} s") from None
        except OSError as error:
            raise CallError(f"connection lost: {explain(error)}") from None
    if not reply["success"]:
        raise CallError(f"{reply['error_type']}: {reply['error']}")
    return reply["result"]


def _read(replies: BinaryIO, size: int) -> bytes:
    data = replies.read(size)
    if len(data) < size:
        raise CallError("connection closed without a reply; the call may have run")
    return data
