"""The master's signals, in the loop."""

import os
import signal

from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.signals import Signals


def test_a_signal_whose_handling_fails_takes_no_other_one_along() -> None:
    pid = os.fork()
    if pid == 0:
        handled = []

        def handle(number: int) -> None:
            handled.append(number)
            raise ValueError(number)

        loop = Loop()
        Signals(loop, handle).catch()
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        loop.turn()
        os._exit({signal.SIGUSR1, signal.SIGUSR2} <= set(handled))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
