"""Which process a client is: its pid together with its start time, which no later one shares."""


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process.

    Field 22 of proc_pid_stat(5). Pid and start time together identify a process until the next
    boot.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stream:
            stat = stream.read(4096)
    except OSError:
        return None
    return int(stat[stat.rindex(b")") + 2 :].split(None, 20)[19])
