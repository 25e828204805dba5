"""The bare pre-fork server, the floor: the baseline for the daemon's throughput.

    floor.py --socket PATH --workers N [--form oneshot|framed]

It accepts, receives, decodes, encodes, sends and closes, with the standard library's sockets, and
does nothing else: no admission, no checks, no threads, no accounting. Its replies have the fields
of the daemon's success reply, so both encode the same amount. The difference to the daemon is the
cost of everything that the daemon guarantees.

It trusts its clients: no timeouts, no size limits. Never use it for anything but measuring.
Stops on SIGTERM or SIGINT and removes its socket.
"""

import argparse
import ctypes
import os
import platform
import select
import signal
import socket
import sys
import time
from typing import Any

import msgspec

BACKLOG = 1024
RECEIVE_BYTES = 65536
PR_SET_PDEATHSIG = 1
PYTHON_VERSION = platform.python_version()

encode = msgspec.json.encode
decode = msgspec.json.decode


def success(request: dict[str, Any], started: float, worker: int) -> dict[str, Any]:
    """The reply to a request: the echo of its params, with the daemon's fields around it."""
    return {
        "success": True,
        "result": request.get("params"),
        "module": request["module"],
        "function": request["function"],
        "request_id": request.get("request_id"),
        "execution_info": {
            "daemon_version": "0.0.0",
            "python_version": PYTHON_VERSION,
            "timestamp": time.time(),
            "duration_ms": (time.perf_counter() - started) * 1000,
            "worker": worker,
        },
    }


def serve_oneshot(listener: socket.socket, worker: int) -> None:
    """Answer one connection after the other (runs in a worker, until it is killed)."""
    while True:
        connection, _ = listener.accept()
        received = connection.recv(RECEIVE_BYTES)
        while True:
            # Clients need not shut down their side, so a request ends where decoding succeeds.
            try:
                if not received.endswith(b"}"):
                    raise msgspec.DecodeError
                request = decode(received)
                break
            except msgspec.DecodeError:
                more = connection.recv(RECEIVE_BYTES)
                if not more:
                    request = None
                    break
                received += more
        if request is not None:
            started = time.perf_counter()
            connection.sendall(encode(success(request, started, worker)))
        connection.close()


def answer_frames(received: bytes, worker: int) -> tuple[bytes, bytes]:
    """The replies to all whole frames in `received`, as frames, and the remaining bytes."""
    replies = []
    at = 0
    while len(received) - at >= 4:
        end = at + 4 + int.from_bytes(received[at : at + 4], "big")
        if len(received) < end:
            break
        started = time.perf_counter()
        reply = encode(success(decode(received[at + 4 : end]), started, worker))
        replies.append(len(reply).to_bytes(4, "big"))
        replies.append(reply)
        at = end
    return b"".join(replies), received[at:]


def serve_framed(listener: socket.socket, worker: int) -> None:
    """Answer frames on kept connections from one epoll loop (runs in a worker, until killed).

    One loop rather than a thread per connection: here, threads of one process would only pass the
    interpreter lock to each other, at a context switch for each call.
    """
    listener.setblocking(False)
    poll = select.epoll()
    # EXCLUSIVE wakes one worker per connection, not all of them.
    poll.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    connections: dict[int, socket.socket] = {}
    leftover: dict[int, bytes] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == listener.fileno():
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    continue  # another worker was faster
                connections[connection.fileno()] = connection
                leftover[connection.fileno()] = b""
                poll.register(connection, select.EPOLLIN)
                continue
            connection = connections[descriptor]
            received = connection.recv(RECEIVE_BYTES)
            if not received:
                poll.unregister(descriptor)
                del connections[descriptor], leftover[descriptor]
                connection.close()
                continue
            replies, leftover[descriptor] = answer_frames(leftover[descriptor] + received, worker)
            connection.sendall(replies)


def main() -> int:
    """Bind, fork the workers, and wait for the signal to stop (runs in the master)."""
    parser = argparse.ArgumentParser(description="The bare pre-fork server to measure against.")
    parser.add_argument("--socket", required=True, help="path to listen on; must not exist yet")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--form", choices=["oneshot", "framed"], default="oneshot")
    options = parser.parse_args()

    serve = serve_oneshot if options.form == "oneshot" else serve_framed
    libc = ctypes.CDLL(None, use_errno=True)
    # Blocked before the first fork, so that no stop signal is missed; workers unblock them.
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(options.socket)
        listener.listen(BACKLOG)
        children = []
        for worker in range(options.workers):
            child = os.fork()
            if child == 0:
                # The kernel kills a worker whose master has died, for whatever reason.
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)
                serve(listener, worker)
            children.append(child)
        signal.sigwait(stop_signals)
        for child in children:
            os.kill(child, signal.SIGTERM)
        for child in children:
            os.waitpid(child, 0)
        os.unlink(options.socket)
    return 0


if __name__ == "__main__":
    sys.exit(main())
