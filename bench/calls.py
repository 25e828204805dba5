"""The call that the benchmarks make, as bytes in the protocol of each server."""

import json
from typing import Any

PAYLOADS = {"100 B": 100, "10 KB": 10_000, "1 MB": 1_000_000}  # bytes of `params` as JSON
SMALLEST = PAYLOADS["100 B"]


def params(size: int) -> dict[str, Any]:
    """Parameters of `size` bytes of JSON: the rows of a report, as scripts send them."""
    value: dict[str, Any] = {"id": 42, "ratio": 0.25, "rows": [], "note": ""}
    length = len(_json(value))
    number = 0
    while True:
        row = {"number": number, "title": "a line of a report", "price": 12.5, "sold": True}
        more = len(_json(row)) + 1
        if length + more > size:
            break
        value["rows"].append(row)
        length += more
        number += 1
    value["note"] = "x" * (size - len(_json(value)))
    return value


def request(size: int = SMALLEST, module: str = "bench") -> bytes:
    """The call of `bench.echo` as the daemon's clients send it, without a frame."""
    call = {"module": module, "function": "echo", "params": params(size), "request_id": "bench-1"}
    return _json(call)


def http_request(size: int, *, keep: bool) -> bytes:
    """The same as an HTTP/1.1 request; `keep`: the connection stays open."""
    body = request(size)
    head = (
        "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: {'keep-alive' if keep else 'close'}\r\n\r\n"
    )
    return head.encode() + body


def uwsgi_request(size: int) -> bytes:
    """The same in uWSGI's own protocol: a header of four bytes, CGI variables, the body."""
    body = request(size)
    variables = {
        "REQUEST_METHOD": "POST",
        "REQUEST_URI": "/",
        "PATH_INFO": "/",
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
    }
    block = b"".join(
        len(text).to_bytes(2, "little") + text.encode()
        for pair in variables.items()
        for text in pair
    )
    return b"\0" + len(block).to_bytes(2, "little") + b"\0" + block + body


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
