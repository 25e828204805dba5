"""A generation: what all workers of one start or reload have in common. Called in the master."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening.listener import Listener
from cpanbridge.supervisor.system.logs import LogSettings


class Stage(Enum):
    """How far a generation has come."""

    BOOTS = "boots"
    SERVES = "serves"
    OVER = "over"  # another generation has replaced it, or it was given up before it served


@dataclass(eq=False)
class Generation:
    """Raises OSError when the process is out of descriptors."""

    number: int
    settings: Settings
    listeners: Sequence[Listener]
    log: LogSettings
    stage: Stage = Stage.BOOTS

    def __post_init__(self) -> None:
        self.wanted = self.settings.worker_count  # workers
        # What `workers = 0` counts may change while the generation serves.
        self.settings = msgspec.structs.replace(self.settings, workers=self.wanted)
        self.opening = os.eventfd(0, os.EFD_CLOEXEC)

    @property
    def in_service(self) -> bool:
        """Whether its workers may accept, and those that die are replaced."""
        return self.stage is Stage.SERVES


class Owner(Protocol):
    """Receives how the workers of a generation fare; called in the loop."""

    def generation_ready(self, generation: Generation) -> None:
        """All workers of a generation that is not in service have booted."""

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker of a generation that is not in service cannot boot."""
