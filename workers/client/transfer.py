"""A client on its way from one worker to another, most often to the owner of its state."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from cpanbridge.supervisor.memory.owners import Owner


class ReturnReason(Enum):
    """Why a client was returned from a hand-off queue."""

    NOT_TAKEN = "the receiver has ended, or had no descriptor for it"
    TOO_LATE = "withdrawn, because it was not taken in time"


class MovingClient(NamedTuple):
    """What the receiving worker needs to go on with a client."""

    descriptor: int
    data: bytes  # what was read from it and not answered yet, beginning with a request
    accepted_at: int  # when it was accepted, CLOCK_MONOTONIC nanoseconds
    requests: int  # that it has made so far
    arrived: float  # when the request in `data` did, CLOCK_MONOTONIC seconds
    ticket: int  # with which it has waited at the gate; 0: it has not
    input_may_have_ended: bool  # a worker that had it may have shut down the receiving side


@dataclass
class Transfer:
    """One hand-off, as its sender sees it. Written by the thread that sends the client.

    But for `return_reason`, which the main thread writes before it withdraws the client.
    """

    moving: MovingClient
    receiver: Owner  # the worker that it is handed to
    until: float  # CLOCK_MONOTONIC seconds: when it is withdrawn
    known: bool = False  # the client has state in the receiving worker
    may_stay: bool = False  # its calls may as well run in the sending worker
    return_reason: ReturnReason = ReturnReason.NOT_TAKEN  # valid once it is returned
