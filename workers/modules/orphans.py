"""A worker that boots must not outlive its master, which alone can let it serve.

Once booted, a worker reads the end of the lifeline. While it imports modules it reads nothing, and
an import may hang. So the kernel kills it when its master ends (prctl(2), PR_SET_PDEATHSIG).
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def end_with_master(enabled: bool) -> None:
    """Whether the kernel kills this process when the process that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if enabled else 0, 0, 0, 0)
