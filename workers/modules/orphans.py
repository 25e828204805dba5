"""A worker that boots must not outlive its master: nobody would ever let it serve.

Once it is booted, it sees the lifeline end. While it imports modules, it looks at nothing, and one
of them may hang. So the kernel is told to end it with its master (prctl(2), PR_SET_PDEATHSIG).
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def end_with_master(yes: bool) -> None:
    """Whether the kernel kills this process when the one that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if yes else 0, 0, 0, 0)
