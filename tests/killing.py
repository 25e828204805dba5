"""Killing a process at each of its steps, to see what it leaves behind."""

import contextlib
import dis
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from cpanbridge.supervisor import gate
from cpanbridge.supervisor.memory import handoff_claims, layout, owners, rate_window, robustlock
from cpanbridge.workers.handoff import incoming, message, outgoing

# All instructions by which others could see a difference; those between them only look.
EFFECTS = ("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "CALL", "BEFORE_WITH", "RETURN_")
STEPS = (gate, owners, robustlock, layout, handoff_claims, rate_window, message, incoming, outgoing)
FILES = {module.__file__ for module in STEPS}


def trace_opcodes(trace: Callable[[FrameType, str, object], Any]) -> None:
    """As `sys.settrace`, for a function that asks for opcodes in the frames that it is shown."""
    # Python 3.12 heeds that it was asked for them, by any frame, at `settrace` only.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)


def has_effect(frame: FrameType) -> bool:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(EFFECTS)


def kill_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed before the `step`-th thing that the gate does.

    Returns whether it was; False when `work` had fewer steps and ended.
    """
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            left = step

            def trace(frame: FrameType, event: str, _: object) -> Any:
                nonlocal left
                if frame.f_code.co_filename not in FILES:
                    return None
                frame.f_trace_opcodes = True
                if event == "opcode" and has_effect(frame):
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                return trace

            trace_opcodes(trace)
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code == -signal.SIGKILL
