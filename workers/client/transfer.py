"""A client's way from the worker that accepted it to another one, most often its state's owner."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from cpanbridge.supervisor.memory.owners import Owner


class Fate(Enum):
    """Why a client has come back that was put into a postbox."""

    NOT_TAKEN = "its owner has ended, or had no descriptor for it"
    TOO_LATE = "withdrawn, because it was not taken in time"


class MovingClient(NamedTuple):
    """A client that changes hands."""

    descriptor: int
    data: bytes  # what was read of it, beginning with a request
    opened_at: int  # when it was accepted, CLOCK_MONOTONIC nanoseconds
    requests: int  # that it has made so far
    arrived: float  # when the request in `data` did, CLOCK_MONOTONIC seconds
    input_may_have_ended: bool  # its sending side, by a worker that had it


@dataclass
class Transfer:
    """One of them."""

    moving: MovingClient
    owner: Owner  # whom it goes to
    until: float  # CLOCK_MONOTONIC seconds: when it is not to wait there any longer
    known: bool = False  # the client has state there
    may_stay: bool = False  # its calls may as well run where it is
    fate: Fate = Fate.NOT_TAKEN  # if it comes back
