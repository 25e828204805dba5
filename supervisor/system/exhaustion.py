"""What an error says: the system has none left of something, or what was asked for is not there.

The first passes, and says nothing about what was asked for: whoever takes it for the second gives
up a client that is still there.
"""

import errno

_EXHAUSTED = frozenset(
    (
        *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
        errno.EAGAIN,  # a queue's room, or what clone(2) says of threads
        errno.ENOSPC,  # what epoll_ctl(2) says of /proc/sys/fs/epoll/max_user_watches
        errno.ETOOMANYREFS,  # descriptors on their way between processes
    )
)


def is_exhausted(error: OSError) -> bool:
    """Whether descriptors, memory or another of the kernel's limits is used up, for now.

    Not to be asked about a file that is written, or a socket that would have to wait.
    """
    return error.errno in _EXHAUSTED
