"""Which workers there are: as many as there should be, and a successor for each that goes.

A worker that dies is replaced at once. One that dies before it is ready is replaced after a pause
that grows each time, and one that dies within a second of being ready after half a second: a broken
module is never a hot loop. That holds for a generation in service; one that is not there yet fails
as a whole when a worker of it cannot boot.

A worker is retired when the daemon is better off without it. It lets nobody in any more, finishes
what runs, and leaves; what it was doing harms nobody. Called in the master.
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Protocol

from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.generation import Company, Generation, Stage
from cpanbridge.supervisor.loop import Loop
from cpanbridge.supervisor.place import Mains, Report
from cpanbridge.supervisor.seats import Seat
from cpanbridge.supervisor.shared import (
    ORDER_RETIRE,
    ORDER_STOP,
    PLEA_HANGS,
    PLEA_WORN,
    Shared,
)
from cpanbridge.supervisor.templates import Template, Templates

LOGGER = logging.getLogger("cpanbridge.master")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
SETTLED_SECONDS = 1.0  # one that was ready for so long did not die of its start
PAUSE_AFTER_READY = 0.5  # for one that was not


class Owner(Protocol):
    """Who is told how the workers fare; called in the loop."""

    def generation_ready(self, generation: Generation) -> None:
        """All workers of a generation that is not in service have booted."""

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker of a generation that is not in service cannot boot."""

    def seat_emptied(self) -> None:
        """A worker has ended, and nothing of it is left."""


class Workforce:
    """All workers of a master."""

    def __init__(
        self,
        owner: Owner,
        loop: Loop,
        shared: Shared,
        bells: Sequence[Bells],
        mains: Mains,
    ) -> None:
        self._owner = owner
        self._shared = shared
        self._company = company = Company(loop, shared, bells, mains)
        self._loop = loop
        self.seats = [Seat(company, number) for number in range(len(shared.slots))]
        self.templates = Templates(company, self.hire, owner.generation_failed)
        # Children that have ended while it was not known yet what they were: pid, wait status.
        self._early: dict[int, int] = {}
        self._stopping = False
        self._adopted: Generation | None = None  # of another master
        loop.watch(company.plea, self._rung)
        self.standing_still = False  # another master is about to take over: nobody is forked
        self.confined = False  # to the seats it has: another master uses the others

    def is_gone(self) -> bool:
        """Whether there is no worker at all, and no template."""
        return not self.templates.alive and not any(seat.pid for seat in self.seats)

    # -- generations --

    def hire(self, generation: Generation) -> None:
        """Fork the workers that a generation lacks, as far as there are free seats for them.

        Its template comes first, and calls this again.
        """
        if self._stopping or self.templates.must_be_awaited(generation):
            return
        for _ in range(generation.wanted - len(self._staff(generation))):
            seat = self._free_seat()
            if seat is None or self._stopping or generation.stage is Stage.OVER:
                return
            self._fork(seat, generation)

    @property
    def life(self) -> list[int]:
        """The write ends of all lifelines, for a master that takes over."""
        return [self._company.life, *self._company.inherited_life]

    @property
    def occupied(self) -> list[int]:
        """The slots that are in use, or will be again."""
        return [seat.number for seat in self.seats if seat.generation is not None]

    def expect(self, generation: Generation, slots: Sequence[int], life: Sequence[int]) -> None:
        """Another master's workers are in these slots: leave them to it, until `adopt`."""
        self._adopted = generation
        self._company.inherited_life = list(life)
        for slot in slots:
            self.seats[slot].generation = generation

    def adopt(self, generation: Generation) -> None:
        """The other master is leaving: its workers are ours."""
        for seat in self._of(generation):
            if not seat.adopt(self._adopted_ended):
                seat.free()

    def dismiss_orphans(self, last: Generation) -> None:
        """End the workers of a dead master that was to follow this one.

        They have never been in service. Nobody takes their slots until they have ended. `last` is
        the generation before theirs.
        """
        seats = [s for s in self.seats if s.generation is None and self._shared.slots[s.number].pid]
        if seats:
            orphans = Generation(last.number + 1, last.settings, (), last.log)
            for seat in seats:
                seat.generation = orphans
            self.adopt(orphans)
            self.dismiss(orphans)

    def _adopted_ended(self, seat: Seat) -> None:
        LOGGER.info("Worker %d (pid %d) has left", seat.number, seat.pid)
        seat.vacate()
        self._after_leaving(seat)
        self._owner.seat_emptied()

    def put_in_service(self, generation: Generation) -> None:
        """From now on its workers accept, and those that die are replaced."""
        self._shared.header.generation = generation.number
        generation.put_in_service()

    def dismiss(self, generation: Generation) -> None:
        """End a generation that has never been in service."""
        generation.stage = Stage.OVER
        self.templates.end(generation)
        for seat in self._of(generation):
            self._give_up(seat, "its generation is given up")
        self._close_if_empty(generation)

    def retire_generation(self, generation: Generation) -> None:
        """Another one has taken over: its workers finish what they run, within `drain_timeout`."""
        generation.stage = Stage.OVER
        self.templates.end(generation)
        for seat in self._of(generation):
            seat.refill_after = False
            if not seat.ready:
                self._give_up(seat, "its generation is retired")
            elif not seat.told:
                seat.leaving, seat.hurry = "its generation is retired", False
                self._tell_to_retire(seat)
        self._close_if_empty(generation)

    def lets_in(self, generation: Generation) -> bool:
        """Whether a worker of a retired generation may still accept a client."""
        return any(seat.lets_in for seat in self._of(generation))

    def _give_up(self, seat: Seat, reason: str) -> None:
        """End a worker that has never accepted, or its next start."""
        if seat.pid:
            seat.leaving = reason
            seat.kill()
        else:
            seat.free()

    def _close_if_empty(self, generation: Generation) -> None:
        if any(self._of(generation)):
            return
        generation.close()
        if generation is self._adopted:  # nobody is left whom the lifeline of another master tells
            self._adopted = None
            while self._company.inherited_life:
                os.close(self._company.inherited_life.pop())

    def stop(self, seconds: float | None) -> None:
        """End all workers: in so many seconds, or None: at once. Nobody is replaced any more."""
        self._stopping = True
        self.templates.end_all()
        for seat in self.seats:
            seat.cancel_start()
            if seat.pid and seconds is None:
                seat.kill()
            elif seat.pid and seconds is not None:
                seat.tell_to_leave(ORDER_STOP, seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every worker and template."""
        self.templates.signal(number)
        for seat in self.seats:
            seat.signal(number)

    # -- retiring --

    def retire(self, slot: int, reason: str, *, replace_first: bool, hurry: bool = True) -> bool:
        """Have the worker in a slot leave: it finishes what runs, within `graceful_timeout`.

        Without `hurry` it has `drain_timeout`, as after a reload: nothing is wrong with it.
        With `replace_first` its replacement takes another slot and boots meanwhile, and only then
        it is told. Otherwise, and when no slot is free, its replacement follows when it has gone.
        False when there is nobody to retire: it boots, leaves already, or is not in service.
        """
        seat = self.seats[slot]
        generation = seat.generation
        if not seat.ready or seat.leaving or self._stopping or self.standing_still:
            return False
        if generation is None or not generation.in_service:
            return False
        LOGGER.warning("Worker %d (pid %d) is retired: %s", slot, seat.pid, reason)
        seat.leaving, seat.hurry = reason, hurry
        successor = self._free_seat() if replace_first else None
        if successor is None:
            seat.refill_after = True
            self._tell_to_retire(seat)
        else:
            successor.replaces = seat
            self._fork(successor, generation)
        return True

    def retire_for_memory(self, slot: int, reason: str) -> bool:
        """As `retire`, with no replacement before it has gone, for there is no room for two.

        One that leaves in its own time, after a reload, is given `graceful_timeout` from now.
        """
        seat = self.seats[slot]
        if not seat.leaving:
            return self.retire(slot, reason, replace_first=False)
        if seat.hurry or self._stopping or seat.generation is None:
            return False
        seat.hurry = True
        if seat.told:
            seconds = seat.generation.settings.limits.graceful_timeout
            LOGGER.warning(
                "Worker %d (pid %d) has %g s left to leave: %s",
                slot,
                seat.pid,
                seconds,
                reason,
            )
            self._tell_to_retire(seat)
        return True

    def add(self, generation: Generation) -> bool:
        """One worker more; False when there is no room for it beside another generation."""
        if self._stopping or self.confined or generation.wanted >= len(self.seats) // 2:
            return False
        if self._free_seat() is None:
            return False  # those that leave take their time, and nobody would hire it after them
        generation.wanted += 1
        self.hire(generation)
        return True

    def remove(self, generation: Generation) -> bool:
        """One worker fewer: it finishes what it runs. False for the last one."""
        staff = [seat for seat in self._of(generation) if not seat.leaving]
        if self._stopping or self.confined or generation.wanted == 1 or not staff:
            return False
        generation.wanted -= 1
        seat = staff[-1]
        replaced, seat.replaces = seat.replaces, None
        if replaced is not None and not replaced.told:
            self._tell_to_retire(replaced)  # whose replacement is not needed any more
        if seat.ready:
            seat.leaving = "one worker fewer"
            seat.tell_to_leave(ORDER_RETIRE, generation.settings.limits.drain_timeout or None)
        else:
            self._give_up(seat, "one worker fewer")
        return True

    def _rung(self) -> None:
        os.eventfd_read(self._company.plea)
        self.hear_pleas()

    def hear_pleas(self) -> None:
        """Retire the workers that ask for it; those that are told already are not told again."""
        for seat in self.seats:
            if seat.plea == PLEA_HANGS:
                self.retire_hung(seat.number)
            elif seat.plea == PLEA_WORN:
                self.retire(seat.number, "it has run max_requests", replace_first=True, hurry=False)

    def retire_hung(self, slot: int) -> None:
        """As `retire`, for a worker with a call that does not end, which may be leaving already.

        It must not take as long to drain as it hangs: it has `graceful_timeout` from now. Without
        effect when it was told so before.
        """
        seat = self.seats[slot]
        if not seat.leaving:
            self.retire(slot, "a call hangs", replace_first=True)
        elif seat.generation is not None and not self._stopping and not self.standing_still:
            seat.hurry = True
            seconds = seat.generation.settings.limits.graceful_timeout
            if seat.told and not seat.leaves_within(seconds):
                self._tell_to_retire(seat)

    def _tell_to_retire(self, seat: Seat) -> None:
        assert seat.generation is not None
        limits = seat.generation.settings.limits
        seconds = limits.graceful_timeout if seat.hurry else limits.drain_timeout or None
        seat.tell_to_leave(ORDER_RETIRE, seconds)

    # -- a worker's life --

    def _fork(self, seat: Seat, generation: Generation) -> None:
        seat.refill = None
        if self.standing_still:
            self._refill_in(seat, generation, FIRST_PAUSE)
            return
        template = self.templates.of(generation)
        if template is not None and template.forks and self._have_forked(seat, template):
            return
        try:
            seat.fork(generation, self._reported)
        except OSError as error:
            LOGGER.error("Worker %d: cannot fork: %s", seat.number, error.strerror)
            seat.generation = generation
            if generation.in_service:
                self._refill_later(seat)
            else:
                reason = f"cannot fork a worker: {error.strerror}"
                self._owner.generation_failed(generation, reason)

    def _have_forked(self, seat: Seat, template: Template) -> bool:
        """Have a template fork a worker; whether it could be told."""
        try:
            seat.have_forked(template.generation, template.order, self._born)
        except OSError as error:
            LOGGER.warning("Worker %d is not forked by its template: %s", seat.number, error)
            return False
        return True

    def _born(self, seat: Seat, pid: int) -> None:
        """A template has forked a worker, or 0: it has not, and is of no use then."""
        generation = seat.generation
        assert generation is not None
        if self.standing_still or not pid:
            seat.cancel_start()
            template = self.templates.of(generation)
            if template is not None and not self.standing_still:
                LOGGER.error("Worker %d was not forked by its template", seat.number)
                template.end()
            self._fork(seat, generation)
        else:
            seat.let_begin(pid, self._reported)
        status = self._early.pop(pid, None)
        if not any(each.unborn for each in self.seats):
            self._early.clear()
        if status is not None and seat.pid == pid:
            self._ended(seat, status)

    def _reported(self, seat: Seat, report: Report) -> None:
        if report.error is not None:
            self._cannot_boot(seat, report.error)
            return
        seat.failures = 0
        LOGGER.info("Worker %d ready (pid %d)", seat.number, seat.pid)
        replaced, seat.replaces = seat.replaces, None
        if replaced is not None and not replaced.told:
            self._tell_to_retire(replaced)
        generation = seat.generation
        if generation is not None and generation.stage is Stage.BOOTS:
            staff = self._staff(generation)
            if len(staff) >= generation.wanted and all(each.ready for each in staff):
                self._owner.generation_ready(generation)

    def _cannot_boot(self, seat: Seat, error: str) -> None:
        LOGGER.error("Worker %d cannot start: %s", seat.number, error)
        generation = seat.generation
        if generation is not None and generation.stage is Stage.BOOTS:
            self._owner.generation_failed(generation, error)

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was neither worker nor template."""
        if self.templates.ended(pid, status):
            return
        for seat in self.seats:
            if seat.pid == pid:
                self._ended(seat, status)
                return
        if any(seat.unborn for seat in self.seats):
            self._early[pid] = status

    def _ended(self, seat: Seat, status: int) -> None:
        how = seat.describe_end(status)
        report = seat.take_report()  # what it said last may not have been read yet
        pid, ready_at, leaving = seat.pid, seat.ready_at, seat.leaving
        seat.vacate()  # first of all: its pid may be another process's from now on
        if not self._stopping:
            if report is not None and report.error is not None:
                self._cannot_boot(seat, report.error)
            if leaving:
                LOGGER.info("Worker %d (pid %d) has left: %s", seat.number, pid, how)
                self._after_leaving(seat)
            elif seat.generation is not None:
                self._after_death(seat, seat.generation, pid, ready_at, how)
        self._owner.seat_emptied()

    def _after_leaving(self, seat: Seat) -> None:
        generation = seat.generation
        for other in self.seats:
            if other.replaces is seat:
                other.replaces = None
        if seat.refill_after and generation is not None:
            seat.refill_after = False
            self._fork(seat, generation)
        else:
            seat.free()
            if generation is not None and generation.stage is Stage.OVER:
                self._close_if_empty(generation)

    def _after_death(
        self, seat: Seat, generation: Generation, pid: int, ready_at: float | None, how: str
    ) -> None:
        if not generation.in_service:
            LOGGER.error("Worker %d (pid %d) died at boot: %s", seat.number, pid, how)
            reason = f"worker {seat.number} died at boot: {how}"
            self._owner.generation_failed(generation, reason)
            return
        self._shared.note_death()
        LOGGER.error("Worker %d (pid %d) died: %s; replacing it", seat.number, pid, how)
        if ready_at is None:
            self._refill_later(seat)
        elif time.monotonic() - ready_at < SETTLED_SECONDS:
            self._refill_in(seat, generation, PAUSE_AFTER_READY)
        else:
            self._fork(seat, generation)

    def _refill_later(self, seat: Seat) -> None:
        """Start it again after a pause that grows with each start that has failed in a row."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**seat.failures)
        seat.failures = min(seat.failures + 1, 16)
        LOGGER.warning("Worker %d: next start in %.1f s", seat.number, pause)
        assert seat.generation is not None
        self._refill_in(seat, seat.generation, pause)

    def _refill_in(self, seat: Seat, generation: Generation, seconds: float) -> None:
        seat.refill = self._loop.after(seconds, lambda: self._fork(seat, generation))

    # -- who sits where --

    def _of(self, generation: Generation) -> list[Seat]:
        return [seat for seat in self.seats if seat.generation is generation]

    def _staff(self, generation: Generation) -> list[Seat]:
        """The seats that count for what a generation should have."""
        return [s for s in self._of(generation) if not s.leaving or s.refill_after]

    def _free_seat(self) -> Seat | None:
        if self.confined:
            return None
        return next((seat for seat in self.seats if seat.generation is None), None)
