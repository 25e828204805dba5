"""When a process started, which with its pid tells it from all others until the next boot."""


def start_time(pid: int) -> int | None:
    """When a process started, in hundredths of a second since boot; None when there is none.

    Field 22 of proc_pid_stat(5). Pid and start time together identify a process until the next
    boot. Also None when this process may not see that one (hidepid, see proc(5)). Raises OSError
    when that cannot be told for now.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stream:
            stat = stream.read(4096)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return int(stat[stat.rindex(b")") + 2 :].split(None, 20)[19])
