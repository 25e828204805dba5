"""What must not fail has a descriptor when all others are used up."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from running_out import no_descriptors

from cpanbridge.supervisor.system.start_time import start_time
from cpanbridge.workers.client.spare_descriptors import KEPT, SpareDescriptors


@pytest.fixture
def spare() -> Iterator[SpareDescriptors]:
    spare = SpareDescriptors()
    spare.begin()
    yield spare
    spare.let_go()


def test_what_must_not_fail_opens_one_when_nothing_else_can(spare: SpareDescriptors) -> None:
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        for _ in range(2 * KEPT):  # closed again, so each is kept again
            assert spare.open(lambda: start_time(os.getpid()))
        assert spare.restore()
        opened = [spare.open(lambda: os.dup(0)) for _ in range(KEPT)]
        assert not spare.restore()
        with pytest.raises(OSError, match="Too many open files"):
            spare.open(lambda: os.dup(0))
        for descriptor in opened:
            os.close(descriptor)
        assert spare.restore()
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)


FORKING = """
import os, resource, socket, sys
from cpanbridge.workers.client.spare_descriptors import spare
from cpanbridge.workers.modules.forks import clean_up_children

near, far = socket.socketpair()
near.bind(b"\\0" + os.urandom(8).hex().encode())
clean_up_children([near.getsockname()])
spare.begin()
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
try:
    while True:
        os.dup(0)
except OSError:
    pass
far.settimeout(20)
if os.fork() == 0:
    os.read(0, 1)  # until the program ends
    os._exit(0)
near.close()
print(far.recv(1))
"""


def test_a_child_that_a_module_forks_lets_go_of_clients_without_a_descriptor_left() -> None:
    program = [sys.executable, "-c", FORKING]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"b''\n"
