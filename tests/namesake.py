"""Two client processes, one after the other, that have the same pid; they pass a connection on.

The first one connects, leaves the connection to the program, and ends. The second one gets its
number and keeps a secret. What the daemon answers on the first one's connection, when it is asked
for that secret, is printed as JSON; or "skip", and why no process can be given a number here.
"""

import json
import os
import socket
import sys
import time

from plain_client import Framed, connect, one_shot

LAST_PID = "/proc/sys/kernel/ns_last_pid"
CLOCK_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; start times are told in these


def fork_as(pid: int) -> int:
    """As os.fork; the child has this number, which no process may have now."""
    for _ in range(2000):
        with open(LAST_PID, "w") as stream:
            stream.write(str(pid - 1))
        forked = os.fork()
        if forked == 0 and os.getpid() != pid:
            os._exit(0)
        if forked in (0, pid):
            return forked
        os.waitpid(forked, 0)
    raise OSError(f"the number {pid} is taken again and again")


def main(path: str, event: str) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    first = os.fork()
    if first == 0:
        connection = connect(path)
        socket.send_fds(theirs, [b"."], [connection.fileno()])
        os._exit(0)
    os.waitpid(first, 0)
    _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
    one_shot(path, "system", "status")  # so the connection before it is accepted
    time.sleep(2 * CLOCK_TICK)
    try:
        second = fork_as(first)
    except OSError as error:
        print("skip:", error)
        return
    if second == 0:
        one_shot(path, "c", "keep", [event, "secret", "name"])
        theirs.send(b".")
        ours.close()
        theirs.recv(1)  # until the program ends
        os._exit(0)
    theirs.close()
    ours.recv(1)
    kept = Framed(path)
    kept.socket.close()
    kept.socket = socket.socket(fileno=descriptor)
    kept.socket.settimeout(30)
    print(json.dumps(kept.call("c", "find", ["name"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
