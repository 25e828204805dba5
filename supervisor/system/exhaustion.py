"""What an error says: the system has none left of something, or what was asked for is not there.

The first passes, and says nothing about what was asked for: whoever takes it for the second gives
up a client that is still there.
"""

import errno

_EXHAUSTED = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
)


def is_exhausted(error: OSError) -> bool:
    """Whether descriptors, memory or another of the kernel's limits is used up, for now.

    ENOSPC is what epoll_ctl(2) says of /proc/sys/fs/epoll/max_user_watches, and EAGAIN what
    clone(2) says of threads: so do not ask about files, or about calls that would have to wait.
    """
    return error.errno in _EXHAUSTED
