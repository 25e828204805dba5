"""Client processes for the tests of state: each is a Python process that gets its calls by line."""

import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("line_client.py")


class ClientProcess:
    """A process that makes calls. `form` is "one-shot" or "framed"."""

    def __init__(self, path: str, form: str = "one-shot") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", str(PROGRAM), path, form],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def begin(self, module: str, function: str, params: Any = None, **fields: Any) -> None:
        """Start a call; `end` must follow."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([module, function, params, fields]) + "\n")
        self.process.stdin.flush()

    def end(self) -> Any:
        """The reply; None for a framed connection that the daemon has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the client process has died"
        return json.loads(line)

    def has_replied(self) -> bool:
        """Whether `end` would not have to wait."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def reply(self, module: str, function: str, params: Any = None, **fields: Any) -> Any:
        """A call's whole reply."""
        self.begin(module, function, params, **fields)
        return self.end()

    def call(self, module: str, function: str, params: Any = None, **fields: Any) -> Any:
        """A call's result; fails when the call does."""
        reply = self.reply(module, function, params, **fields)
        assert reply is not None
        assert reply["success"], reply
        return reply["result"]

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> "ClientProcess":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.kill()
