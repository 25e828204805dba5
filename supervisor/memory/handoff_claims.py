"""Which worker a client on its way belongs to: a row of claims for each sender.

Each worker has a row in the shared memory. The message that hands a client over names one claim of
its sender's row, and that word says whose the client is: the sender's still, or the receiver's
since it has taken it. A claim is a number that goes up with every use, and a state; so a message
that arrives late finds another number, and its client is nobody's.

`take`, `refuse` and `withdraw` are called under the gate's lock: what becomes of a client is
decided once. (Offering it needs none, nor does cancelling a dead sender's.) A process that is
killed between any two stores leaves a claim as it was, or as it should be. A claim is one word, and
its offer is made known by the message, so no other order of stores is relied on.
"""

from collections import deque
from typing import NamedTuple

CLAIMS = 256  # in a row; more clients of one worker than are ever on their way in practice
SIZE = 8 * CLAIMS  # bytes

_STATES = 4
_FREE, _OFFERED, _TAKEN, _REFUSED = range(_STATES)


class Claim(NamedTuple):
    """One use of a position in a worker's row."""

    position: int
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
        """Make the client the sender's again; False when it was taken or refused before."""
        return self._change(claim, _FREE)

    def _change(self, claim: Claim, state: int) -> bool:
        if self._memory[claim.position] != claim.offered:
            return False
        self._memory[claim.position] = claim.number * _STATES + state
        return True

    def is_offered(self, claim: Claim) -> bool:
        """Whether the client is neither taken nor refused yet. Called without the lock."""
        return bool(self._memory[claim.position] == claim.offered)

    def is_taken(self, claim: Claim) -> bool:
        """Whether the client is its receiver's. Called without the lock."""
        return bool(self._memory[claim.position] == claim.number * _STATES + _TAKEN)

    def cancel_all(self) -> None:
        """Nobody takes a client of a worker that is dead. Called in the master."""
        for position, word in enumerate(self._memory.tolist()):
            if word % _STATES != _FREE:
                self._memory[position] = word - word % _STATES


class ClaimIssuer:
    """The sender's side: a worker gives out the claims of its own row."""

    def __init__(self, claims: Claims) -> None:
        self._memory = claims._memory
        self._free = deque(range(CLAIMS))

    def issue(self) -> Claim | None:
        """Offer a client; None when all claims are in use."""
        try:
            position = self._free.popleft()
        except IndexError:
            return None
        claim = Claim(position, self._memory[position] // _STATES + 1)
        self._memory[position] = claim.offered
        return claim

    def give_back(self, claim: Claim) -> None:
        """The client is one side's or the other's, once and for all."""
        self._free.append(claim.position)
