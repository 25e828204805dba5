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

CLAIMS = 256  # in a row; more clients of one worker than are ever on their way in practice
SIZE = 8 * CLAIMS  # bytes

_STATES = 4
_FREE, _OFFERED, _TAKEN, _REFUSED = range(_STATES)


class Claim(NamedTuple):
    """One use of a place in a worker's row."""

    context: int
    number: int

    @property
    def offered(self) -> int:
        """The word that says that the client is its sender's, and may be taken."""
        return self.number * _STATES + _OFFERED


class Claims:
    """One worker's row."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is `SIZE` bytes as 64-bit integers."""
        self._memory = memory

    def take(self, claim: Claim) -> bool:
        """Make the client ours; False when it was withdrawn, or its sender is dead."""
        return self._change(claim, _TAKEN)

    def refuse(self, claim: Claim) -> bool:
        """Leave the client to its sender."""
        return self._change(claim, _REFUSED)

    def withdraw(self, claim: Claim) -> bool:
        """Make the client the sender's again; False when something has become of it before."""
        return self._change(claim, _FREE)

    def _change(self, claim: Claim, state: int) -> bool:
        context, number = claim
        if self._memory[context] != claim.offered:
            return False
        self._memory[context] = number * _STATES + state
        return True

    def is_offered(self, claim: Claim) -> bool:
        """Whether nothing has become of the client yet. Called without the lock, as the next."""
        return bool(self._memory[claim.context] == claim.offered)

    def is_taken(self, claim: Claim) -> bool:
        """Whether the client is its receiver's."""
        return bool(self._memory[claim.context] == claim.number * _STATES + _TAKEN)

    def cancel_all(self) -> None:
        """Nobody takes a client of a worker that is dead. Called in the master."""
        for context, word in enumerate(self._memory.tolist()):
            if word % _STATES != _FREE:
                self._memory[context] = word - word % _STATES


class ClaimIssuer:
    """The sender's side of it: a worker gives out the tickets of its own row."""

    def __init__(self, claims: Claims) -> None:
        self._memory = claims._memory
        self._free = deque(range(CLAIMS))

    def issue(self) -> Claim | None:
        """Offer a client; None when all tickets are in use."""
        try:
            context = self._free.popleft()
        except IndexError:
            return None
        claim = Claim(context, self._memory[context] // _STATES + 1)
        self._memory[context] = claim.offered
        return claim

    def give_back(self, claim: Claim) -> None:
        """The client is one side's or the other's, once and for all."""
        self._free.append(claim.context)
