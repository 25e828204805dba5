"""Which worker owns a client's state: reading and writing the tables in the shared memory.

There is a row for each client process, or for each client process and module of affinity "module".
A row is written by the owner itself, once it watches the client's end, so each is taken out again.
What all clients share has a row of its own that says where new clients go: never to a worker that
is to exit, so its clients become fewer until it can.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import (
    NOBODY,
    ClientProcess,
    Owner,
    incarnation_of,
    owner_number,
    slot_of,
)
from cpanbridge.workers.client.identity import has_ended
from cpanbridge.workers.modules.registry import FOR_CLIENT

_MORE = 2  # sessions than another worker has, and a new client goes there
# What an answer's number tells besides the owner.
_KNOWN, _LOST, _NOT_WRITTEN, _FLAGS = 1, 2, 4, 8
# What `_take` returns.
_ANOTHERS, _WRITTEN, _FULL = range(3)


class Answer(NamedTuple):
    """Where a call is to run."""

    owner: Owner
    known: bool  # the client has state there, or had
    lost: bool = False  # the owner has ended, and the state with it


class Ownership:
    """One worker's view of who owns what. Called from the threads that serve clients."""

    def __init__(self, shared: Shared, slot: int) -> None:
        self._shared = shared
        self._run = shared.lock.run
        self._slots = shared.slots
        self.me = shared.owner(slot)
        self._my_number = self.me.number

    @property
    def most(self) -> int:
        """How many rows of clients there can be."""
        return self._shared.sessions.rows

    def find(self, process: ClientProcess, owned_as: int, *, may_move: bool) -> Answer:
        """Where a call is to run. State that is lost is forgotten, once it has been answered.

        With `may_move` a client without state is sent to a worker with fewer sessions.
        """
        module, modules = self._key_of(owned_as)
        answer = self._run(self._answer, process, owned_as, may_move, module, modules)
        if answer & _NOT_WRITTEN:
            # So many names come only of many reloads: the rows of dead owners can go.
            table = self._shared.module_owners
            for key, owner in list(table.all()):
                if not self.is_there(owner):
                    self._run(table.remove, key, owner.number)
            answer = self._run(self._answer, process, owned_as, may_move, module, modules)
        return Answer(
            Owner.of(answer // _FLAGS), known=bool(answer & _KNOWN), lost=bool(answer & _LOST)
        )

    def is_there(self, owner: Owner) -> bool:
        """Whether a worker still lives, as far as the master has seen."""
        return self._shared.is_there(owner)

    def take(self, process: ClientProcess, owned_as: int) -> bool | None:
        """Write the row that says that the state is here. Called once the client is watched.

        False when it belongs to another worker by now; None when all rows are taken.
        """
        outcome = self._run(self._take, process, owned_as, *self._key_of(owned_as))
        return None if outcome == _FULL else outcome == _WRITTEN

    def forget(self, process: ClientProcess) -> None:
        """Take the rows out that say that a client's state is here."""
        self._run(self._shared.sessions.remove, process, self._my_number)

    def sweep(self) -> bool:
        """Take out the rows of clients that ended after their owner had; whether there are any."""
        dead = {
            (process, owner)
            for process, owner in self._shared.sessions.all()
            if not self.is_there(owner) and has_ended(process)
        }
        for process, owner in dead:
            self._run(self._shared.sessions.remove, process, owner.number)
        return bool(dead)

    def _key_of(self, owned_as: int) -> tuple[ClientProcess, Sequence[int] | None]:
        """What stands for a module in its table; and how many modules each slot's worker has.

        The latter at a glance, and only where an owner may have to be chosen.
        """
        key = ClientProcess(0, owned_as)
        if owned_as == FOR_CLIENT:
            return key, None
        owner = self._shared.module_owners.find(key, owned_as)
        if owner != NOBODY and self._may_own(owner):
            return key, None
        modules = [0] * len(self._slots)
        for _, each in self._shared.module_owners.all():
            modules[each.slot] += 1
        return key, modules

    # -- under the gate's lock; an owner is its number --

    def _answer(
        self,
        process: ClientProcess,
        owned_as: int,
        may_move: int,
        module: ClientProcess,
        modules: Sequence[int] | None,
    ) -> int:
        answer = self._find(process, owned_as, module, modules)
        owner = answer // _FLAGS
        if not answer & _KNOWN:
            if may_move and owner == self._my_number:
                return self._less_burdened() * _FLAGS
        elif not self._is_there(owner):
            self._shared.sessions.remove(process, owner)
            return answer + _LOST
        return answer

    def _take(
        self,
        process: ClientProcess,
        owned_as: int,
        module: ClientProcess,
        modules: Sequence[int] | None,
    ) -> int:
        answer = self._find(process, owned_as, module, modules)
        if answer // _FLAGS != self._my_number:
            return _ANOTHERS
        if answer & _KNOWN or self._shared.sessions.insert(process, owned_as, self._my_number):
            return _WRITTEN
        return _FULL

    def _may_own(self, owner: int) -> bool:
        """Whether a worker may be given new state."""
        return self._is_there(owner) and bool(self._slots[slot_of(owner)].serves)

    def _is_there(self, owner: int) -> bool:
        incarnation: int = self._slots[slot_of(owner)].incarnation
        return incarnation == incarnation_of(owner)

    def _find(
        self,
        process: ClientProcess,
        owned_as: int,
        module: ClientProcess,
        modules: Sequence[int] | None,
    ) -> int:
        """The owner times _FLAGS, plus what is told besides."""
        owner = self._shared.sessions.find(process, owned_as)
        if owner != NOBODY:
            return owner * _FLAGS + _KNOWN
        if owned_as != FOR_CLIENT:
            return self._owner_for_module(module, modules)
        if self._slots[self.me.slot].is_staying:
            return self._my_number * _FLAGS
        return self._least(None) * _FLAGS

    def _less_burdened(self) -> int:
        """The worker with the fewest sessions, if this one has too many; else this one.

        Of idle workers always the same one accepts, so new sessions would all begin there.
        """
        least = self._least(None)
        mine = self._slots[self.me.slot].sessions
        return least if mine >= self._slots[slot_of(least)].sessions + _MORE else self._my_number

    def _owner_for_module(self, module: ClientProcess, modules: Sequence[int] | None) -> int:
        table = self._shared.module_owners
        owner = table.find(module, module.start)
        if owner != NOBODY:
            if self._may_own(owner):
                return owner * _FLAGS
            table.remove(module, owner)
        chosen = self._least(modules)
        if chosen == self._my_number and not self._slots[self.me.slot].serves:
            return chosen * _FLAGS  # none serves: the last one of those that exit
        written = table.insert(module, module.start, chosen)
        return chosen * _FLAGS + (0 if written else _NOT_WRITTEN)

    def _least(self, modules: Sequence[int] | None) -> int:
        """Of the workers that stay, the one with the fewest modules, or (None) sessions."""
        chosen, least, stays = self._my_number, -1, False
        number = 0
        while number < self._shared.header.slots_used:
            slot = self._slots[number]
            # First: if the worker ends meanwhile, it is not taken for the next one in its slot.
            owner = owner_number(number, slot.incarnation)
            # None is staying when a reload has just told the old ones to exit, and the new ones are
            # about to say that they serve.
            is_staying = slot.is_staying
            if is_staying or (slot.serves and not stays):
                burden = slot.sessions if modules is None else modules[number]
                if least < 0 or burden < least or (is_staying and not stays):
                    chosen, least, stays = owner, burden, is_staying
            number += 1
        return chosen
