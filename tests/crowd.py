"""Many client processes at once: run as a program, forks them, and kills them at a line on stdin.

It prints how many calls succeeded, and when it killed them (Unix time in seconds).
"""

import os
import signal
import sys
import time


def main(path: str, count: int, module: str, function: str, event: str) -> None:
    from plain_client import one_shot

    children = []
    for number in range(count):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            reply = one_shot(path, module, function, [event, number], timeout=90)
            if not reply["success"]:
                print(reply, file=sys.stderr, flush=True)
            os.write(write_end, b"+" if reply["success"] else b"-")
            while True:
                signal.pause()
        os.close(write_end)
        children.append((child, read_end))
    made = [os.read(end, 1) for _, end in children]
    print(made.count(b"+"), flush=True)
    sys.stdin.readline()
    now = time.time()
    for child, _ in children:
        os.kill(child, signal.SIGKILL)
    for child, _ in children:
        os.waitpid(child, 0)
    print(now, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
