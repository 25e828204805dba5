"""Who answers for a client that is on its way from one worker to another: a row of tickets.

Each worker has a row in the shared memory. The message that hands a client over names one of its
sender's tickets, and the client is whose the ticket says: the sender's still, or the receiver's
since it has taken it. A ticket is one word, a number that goes up with every use and a state, so
that a message that comes late finds another number and is nobody's.

`take`, `refuse` and `withdraw` are called under the gate's lock: what becomes of a client is
decided once. A process that is killed between any two stores leaves a ticket as it was, or as it
should be.
"""

from collections import deque
from typing import NamedTuple

TICKETS = 256  # in a row; more clients of one worker than are ever on their way in practice
SIZE = 8 * TICKETS  # bytes

_STATES = 4
_FREE, _OFFERED, _TAKEN, _REFUSED = range(_STATES)


class Ticket(NamedTuple):
    """One use of a place in a worker's row."""

    place: int
    number: int

    @property
    def offered(self) -> int:
        """The word that says that the client is its sender's, and may be taken."""
        return self.number * _STATES + _OFFERED


class Tickets:
    """One worker's row."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is `SIZE` bytes as 64-bit integers."""
        self._memory = memory

    def take(self, ticket: Ticket) -> bool:
        """Make the client ours; False when it was withdrawn, or its sender is dead."""
        return self._change(ticket, _TAKEN)

    def refuse(self, ticket: Ticket) -> bool:
        """Leave the client to its sender."""
        return self._change(ticket, _REFUSED)

    def withdraw(self, ticket: Ticket) -> bool:
        """Make the client the sender's again; False when something has become of it before."""
        return self._change(ticket, _FREE)

    def _change(self, ticket: Ticket, state: int) -> bool:
        place, number = ticket
        if self._memory[place] != ticket.offered:
            return False
        self._memory[place] = number * _STATES + state
        return True

    def is_offered(self, ticket: Ticket) -> bool:
        """Whether nothing has become of the client yet. Called without the lock, as the next."""
        return bool(self._memory[ticket.place] == ticket.offered)

    def is_taken(self, ticket: Ticket) -> bool:
        """Whether the client is its receiver's."""
        return bool(self._memory[ticket.place] == ticket.number * _STATES + _TAKEN)

    def cancel_all(self) -> None:
        """Nobody takes a client of a worker that is dead. Called in the master."""
        for place, word in enumerate(self._memory.tolist()):
            if word % _STATES != _FREE:
                self._memory[place] = word - word % _STATES


class TicketWriter:
    """The sender's side of it: a worker gives out the tickets of its own row."""

    def __init__(self, tickets: Tickets) -> None:
        self._memory = tickets._memory
        self._free = deque(range(TICKETS))

    def issue(self) -> Ticket | None:
        """Offer a client; None when all tickets are in use."""
        try:
            place = self._free.popleft()
        except IndexError:
            return None
        ticket = Ticket(place, self._memory[place] // _STATES + 1)
        self._memory[place] = ticket.offered
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """The client is one side's or the other's, once and for all."""
        self._free.append(ticket.place)
