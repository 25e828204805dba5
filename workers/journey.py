"""A client's way from the worker that accepted it to the one that owns its state."""

from dataclasses import dataclass
from enum import Enum
from socket import SocketType
from typing import NamedTuple

from cpanbridge.supervisor.owners import Owner


class Fate(Enum):
    """Why a client has come back that was put into a postbox."""

    NOT_TAKEN = "its owner has ended, or had no descriptor for it"
    TOO_LATE = "withdrawn, because it was not taken in time"


class Passenger(NamedTuple):
    """A client that changes hands."""

    client: SocketType
    data: bytes  # what was read of it, beginning with a request
    opened_at: int  # when it was accepted, CLOCK_MONOTONIC nanoseconds
    requests: int  # that it has made so far
    arrived: float  # when the request in `data` did, CLOCK_MONOTONIC seconds


@dataclass
class Journey:
    """One of them."""

    passenger: Passenger
    owner: Owner
    known: bool  # the client has state there
    until: float  # CLOCK_MONOTONIC seconds: when the client has no more use for a reply
    fate: Fate = Fate.NOT_TAKEN  # if it comes back
