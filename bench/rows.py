"""The rows of `peers.py`. To add one: add a `Row` to `ROWS`, and its `Server`."""

import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import calls
import peerenv
from load import load_command
from servers import (
    BENCH,
    KEPT_MODULE,
    call,
    call_framed,
    call_web,
    daemon_config,
    find_cpanbridged,
)

# Clients times bytes of payload. Pure Perl takes about a second to encode and decode 1 MB, and each
# client makes at least one call: beyond this a run would take minutes, and measure Perl alone.
PERL_MOST_BYTES = 20_000_000
# The same for eight requests in flight on each connection.
PIPELINED_MOST_BYTES = 20_000_000
PERL_BATCH_BYTES = 1_000_000  # of requests, in one `call_many`
PERL_BATCH_CALLS = 100
THREADS = 8
BACKLOG = 1024


@dataclass(frozen=True)
class Server:
    """A server that runs during the whole benchmark."""

    name: str
    # From folder and number of workers to the command line; raises peerenv.Missing.
    command: Callable[[Path, int], list[str]]
    trial: Callable[[Path], dict[str, Any]] = call

    def socket(self, folder: Path) -> Path:
        """The path that it listens on, if it runs in this folder."""
        return folder / ("daemon.sock" if self.name == "cpanbridged" else f"{self.name}.sock")


@dataclass(frozen=True)
class Target:
    """What a load generator is run against."""

    folder: Path  # with the load generator compiled from load.c
    socket: Path
    clients: int
    payload: int  # bytes
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of the table. `server` is None where each call starts a process of its own."""

    name: str
    server: Server | None
    command: Callable[[Target], list[str]]
    request: Callable[[int], bytes]  # from the payload's bytes
    most_bytes: float = math.inf  # the row is skipped if clients times bytes of payload are more


def _floor(form: str, folder: Path, workers: int) -> list[str]:
    command = [sys.executable, str(BENCH / "floor.py"), f"--workers={workers}", f"--form={form}"]
    return [*command, f"--socket={folder}/floor-{form}.sock"]


def _daemon(folder: Path, workers: int) -> list[str]:
    config = daemon_config(folder, workers, unlimited=True, more=KEPT_MODULE)
    return [find_cpanbridged(), "run", "--config", str(config)]


def _gunicorn(
    name: str, options: Callable[[int], list[str]], folder: Path, workers: int
) -> list[str]:
    command = [str(peerenv.install("gunicorn")), "peer_app:application", f"--chdir={BENCH}"]
    command += [f"--bind=unix:{folder}/{name}.sock", f"--backlog={BACKLOG}"]
    # Its documentation recommends memory for the heartbeat files.
    return [*command, "--worker-tmp-dir=/dev/shm", *options(workers)]


def _uwsgi(folder: Path, workers: int) -> list[str]:
    command = [str(peerenv.install("uWSGI")), "--master", "--need-app", "--die-on-term"]
    command += [f"--uwsgi-socket={folder}/uwsgi.sock", f"--listen={BACKLOG}"]
    command += [f"--processes={workers}", f"--threads={THREADS}", "--disable-logging"]
    command += ["--single-interpreter", f"--chdir={BENCH}", "--module=peer_app:application"]
    return [*command, f"--virtualenv={peerenv.FOLDER}"]


def _compiled(form: str, pipeline: int, target: Target) -> list[str]:
    program = target.folder / "load"
    return load_command(program, target.socket, form, target.clients, target.seconds, pipeline)


def _perl(way: str, target: Target) -> list[str]:
    perl = shutil.which("perl")
    if perl is None:
        raise peerenv.Missing("no perl on PATH")
    batch = max(1, min(PERL_BATCH_CALLS, PERL_BATCH_BYTES // target.payload))
    command = [perl, f"-I{BENCH.parent}/perl/lib", str(BENCH / "client.pl"), f"--way={way}"]
    command += [f"--clients={target.clients}", f"--seconds={target.seconds}", f"--batch={batch}"]
    command += [f"--socket={target.socket}", "--request=-"]
    return [*command, f"--python={sys.executable}", f"--script={BENCH}/modules/one_call.py"]


def _web(request: bytes, path: Path) -> dict[str, Any]:
    return call_web(path, request)


_TRY_HTTP = partial(_web, calls.http_request(calls.SMALLEST, keep=False))
_TRY_UWSGI = partial(_web, calls.uwsgi_request(calls.SMALLEST))
_CLOSING = partial(calls.http_request, keep=False)
_KEEPING = partial(calls.http_request, keep=True)
_KEPT = partial(calls.request, module="kept")

FLOOR = Server("floor-oneshot", partial(_floor, "oneshot"))
FRAMED_FLOOR = Server("floor-framed", partial(_floor, "framed"), call_framed)
DAEMON = Server("cpanbridged", _daemon)
# Its documentation recommends 2 x cores + 1 processes if one serves one client at a time.
SYNC = Server(
    "sync",
    partial(_gunicorn, "sync", lambda cores: [f"--workers={2 * cores + 1}"]),
    _TRY_HTTP,
)
GTHREAD = Server(
    "gthread",
    partial(
        _gunicorn,
        "gthread",
        lambda cores: [f"--workers={cores}", "--worker-class=gthread", f"--threads={THREADS}"],
    ),
    _TRY_HTTP,
)
UWSGI = Server("uwsgi", _uwsgi, _TRY_UWSGI)

_ONESHOT = partial(_compiled, "oneshot", 1)
_FRAMED = partial(_compiled, "framed", 1)
_PIPELINED = partial(_compiled, "framed", 8)
_HTTP = partial(_compiled, "http", 1)

ROWS = [  # the baseline first
    Row("floor, one-shot", FLOOR, _ONESHOT, calls.request),
    Row("floor, framed", FRAMED_FLOOR, _FRAMED, calls.request),
    Row("floor, framed, pipelined", FRAMED_FLOOR, _PIPELINED, calls.request, PIPELINED_MOST_BYTES),
    Row("cpanbridged, one-shot", DAEMON, _ONESHOT, calls.request),
    Row("cpanbridged, framed", DAEMON, _FRAMED, calls.request),
    Row("cpanbridged, framed, pipelined", DAEMON, _PIPELINED, calls.request, PIPELINED_MOST_BYTES),
    Row("cpanbridged, one-shot, state of one client", DAEMON, _ONESHOT, _KEPT),
    Row("cpanbridged, framed, state of one client", DAEMON, _FRAMED, _KEPT),
    Row("Perl call_python", DAEMON, partial(_perl, "call_python"), calls.request, PERL_MOST_BYTES),
    Row("Perl call_many", DAEMON, partial(_perl, "call_many"), calls.request, PERL_MOST_BYTES),
    Row(
        "Perl, a connection per call",
        DAEMON,
        partial(_perl, "reconnect"),
        calls.request,
        PERL_MOST_BYTES,
    ),
    Row("Perl, by hand", DAEMON, partial(_perl, "by_hand"), calls.request, PERL_MOST_BYTES),
    Row("uWSGI, uwsgi protocol", UWSGI, _ONESHOT, calls.uwsgi_request),
    Row("gunicorn sync, HTTP", SYNC, _ONESHOT, _CLOSING),
    Row("gunicorn gthread, HTTP", GTHREAD, _ONESHOT, _CLOSING),
    Row("gunicorn gthread, HTTP kept", GTHREAD, _HTTP, _KEEPING),
    Row(
        "Perl, a Python process per call",
        None,
        partial(_perl, "process"),
        calls.request,
        PERL_MOST_BYTES,
    ),
]


def versions() -> dict[str, str]:
    """Versions of the software and the machine, to compare figures of different days."""
    found = {name: peerenv.version(name) or "not installed" for name in ("gunicorn", "uWSGI")}
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "Python": sys.version.split()[0],
        **found,
        "Linux": os.uname().release,
        "cores": f"{os.cpu_count()} ({models[0] if models else os.uname().machine})",
    }
