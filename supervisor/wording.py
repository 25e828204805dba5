"""What a person reads: numbers with their nouns, and what the kernel refused, as a sentence.

For output of the command, log lines and answers to clients. Imports nothing of the project.
"""

import errno

_MORE_PROCESSES = (
    "no further process or thread may be started, raise the limit "
    "(ulimit -u, TasksMax=, pids.max of a container)"
)
_ADVICE = {
    errno.EMFILE: "raise this process's limit (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "the whole machine has none left, raise fs.file-max (sysctl)",
    errno.ENOMEM: "the machine or its container has no memory left for it",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or raise the user's quota",
    errno.EROFS: "choose a place that can be written (ReadWritePaths= of a service)",
    errno.EACCES: "give the daemon's user access, or choose another place",
    errno.EPERM: "it takes another user, or a right that this one lacks",
    errno.ECONNREFUSED: "nothing listens there",
}


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def explain(error: Exception) -> str:
    """The kernel's own words, and what can be done; without the path, which its caller names.

    An error that is not the kernel's is told in its own words.
    """
    if not isinstance(error, OSError):
        return str(error)
    words = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    return f"{words}: {advice}" if advice else words


def explain_start(error: OSError) -> str:
    """The same, where a process or thread could not be started: EAGAIN is a limit of them then."""
    if error.errno == errno.EAGAIN:
        return f"{error.strerror}: {_MORE_PROCESSES}"
    return explain(error)


def explain_with_path(error: OSError) -> str:
    """The same, with the path, where no caller names it."""
    path = f"{error.filename}: " if error.filename is not None else ""
    return path + explain_start(error)
