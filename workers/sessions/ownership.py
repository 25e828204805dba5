"""Which worker owns a client's state: reading and writing the tables in the shared memory.

There is a row for each client process, or for each client process and module of affinity "module".
A row is written by the owner itself, once it watches the client's end, so each is taken out again.
What all clients share has a row of its own that says where new clients go: never to a worker that
is to exit, so its clients become fewer until it can.
"""

from collections.abc import Callable
from typing import NamedTuple

from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import ClientProcess, Owner
from cpanbridge.workers.client.identity import has_ended
from cpanbridge.workers.modules.registry import FOR_CLIENT

_MORE = 2  # sessions than another worker has, and a new client goes there


class Answer(NamedTuple):
    """Where a call is to run."""

    owner: Owner
    known: bool  # the client has state there, or had
    lost: bool = False  # the owner has ended, and the state with it


class Ownership:
    """One worker's view of who owns what. Called from the threads that serve clients."""

    def __init__(self, shared: Shared, slot: int) -> None:
        self._shared = shared
        self._slots = shared.slots
        self.me = shared.owner(slot)

    @property
    def most(self) -> int:
        """How many rows of clients there can be."""
        return self._shared.sessions.rows

    def find(self, process: ClientProcess, owned_as: int, *, may_move: bool) -> Answer:
        """Where a call is to run. State that is lost is forgotten, once it has been answered.

        With `may_move` a client without state is sent to a worker with fewer sessions.
        """
        with self._shared.lock:
            answer = self._find(process, owned_as)
            if answer.known and not self.is_there(answer.owner):
                self._shared.sessions.remove(process, answer.owner)
                return answer._replace(lost=True)
            if may_move and answer == Answer(self.me, known=False):
                return Answer(self._less_burdened() or self.me, known=False)
            return answer

    def is_there(self, owner: Owner) -> bool:
        """Whether a worker still lives, as far as the master has seen."""
        return self._shared.is_there(owner)

    def take(self, process: ClientProcess, owned_as: int) -> bool | None:
        """Write the row that says that the state is here. Called once the client is watched.

        False when it belongs to another worker by now; None when all rows are taken.
        """
        with self._shared.lock:
            answer = self._find(process, owned_as)
            if answer.owner != self.me:
                return False
            if answer.known or self._shared.sessions.insert(process, owned_as, self.me):
                return True
            return None

    def forget(self, process: ClientProcess) -> None:
        """Take the rows out that say that a client's state is here."""
        with self._shared.lock:
            self._shared.sessions.remove(process, self.me)

    def sweep(self) -> bool:
        """Take out the rows of clients that ended after their owner had; whether there are any."""
        dead = {
            (process, owner)
            for process, owner in self._shared.sessions.all()
            if not self.is_there(owner) and has_ended(process)
        }
        with self._shared.lock:
            for process, owner in dead:
                self._shared.sessions.remove(process, owner)
        return bool(dead)

    # -- called under the gate's lock --

    def _find(self, process: ClientProcess, owned_as: int) -> Answer:
        owner = self._shared.sessions.find(process, owned_as)
        if owner is not None:
            return Answer(owner, known=True)
        if owned_as == FOR_CLIENT:
            return Answer(self._owner_for_client(), known=False)
        return Answer(self._owner_for_module(owned_as), known=False)

    def _owner_for_client(self) -> Owner:
        if self._slots[self.me.slot].is_staying:
            return self.me
        return self._least(self._sessions_of) or self.me

    def _less_burdened(self) -> Owner | None:
        """The worker with the fewest sessions, if this one has too many; else None.

        Of idle workers always the same one accepts, so new sessions would all begin there.
        """
        least = self._least(self._sessions_of)
        if least is None or self._sessions_of(self.me) < self._sessions_of(least) + _MORE:
            return None
        return least

    def _sessions_of(self, owner: Owner) -> int:
        return int(self._slots[owner.slot].sessions)

    def _owner_for_module(self, module: int) -> Owner:
        table = self._shared.module_owners
        key = ClientProcess(0, module)
        owner = table.find(key, module)
        if owner is not None:
            if self.is_there(owner) and self._slots[owner.slot].serves:
                return owner
            table.remove(key, owner)
        modules = [each for _, each in table.all()]
        chosen = self._least(modules.count)
        if chosen is None:
            return self.me  # none serves: the last one of those that exit
        if not table.insert(key, module, chosen):
            # So many names come only of many reloads: the rows of dead owners can go.
            for each, old in list(table.all()):
                if not self.is_there(old):
                    table.remove(each, old)
            table.insert(key, module, chosen)
        return chosen

    def _least(self, burden: Callable[[Owner], int]) -> Owner | None:
        workers = self._shared.workers()
        serving = [owner for owner, slot in workers if slot.serves]
        # None is staying when a reload has just told the old ones to exit, and the new ones are
        # about to say that they serve.
        staying = [owner for owner, slot in workers if slot.is_staying]
        return min(staying or serving, key=burden, default=None)
