"""The slots of a master, and which of them are free. Called in the master."""

from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.spawner import Spawner
from cpanbridge.supervisor.processes.worker_process import WorkerProcess


class Slots:
    """One worker process for each slot of the shared memory; most slots are free."""

    def __init__(self, spawner: Spawner) -> None:
        self.workers = [WorkerProcess(spawner, n) for n in range(len(spawner.shared.slots))]
        self.confined = False  # to those in use: another master uses the others

    @property
    def occupied(self) -> list[int]:
        """The numbers of the slots that are in use, or will be again."""
        return [worker.number for worker in self.workers if worker.generation is not None]

    def of(self, generation: Generation) -> list[WorkerProcess]:
        """All workers of a generation."""
        return [worker for worker in self.workers if worker.generation is generation]

    def counted(self, generation: Generation) -> list[WorkerProcess]:
        """The workers that count for what a generation should have.

        One that exits does not, unless its replacement follows in the same slot.
        """
        return [w for w in self.of(generation) if not w.exiting or w.replace_in_place]

    def free(self) -> WorkerProcess | None:
        """A slot for another worker, if there is any."""
        if self.confined:
            return None
        return next((worker for worker in self.workers if worker.generation is None), None)
