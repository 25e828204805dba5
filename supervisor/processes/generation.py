"""A generation: what all workers of one start or reload have in common. Called in the master."""

import os
from collections.abc import Sequence
from enum import Enum

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening.listener import Listener
from cpanbridge.supervisor.system.logs import LogSettings


class Stage(Enum):
    """How far a generation has come."""

    BOOTS = "boots"
    SERVES = "serves"
    OVER = "over"  # another generation has replaced it, or it was abandoned before it served


class Generation:
    """What all workers of one start or reload have in common."""

    def __init__(
        self, number: int, settings: Settings, listeners: Sequence[Listener], log: LogSettings
    ) -> None:
        self.number = number
        self.settings = settings
        self.listeners = listeners
        self.log = log
        self.wanted = settings.worker_count  # workers
        self.stage = Stage.BOOTS
        self.opening = os.eventfd(0, os.EFD_CLOEXEC)

    @property
    def in_service(self) -> bool:
        """Whether its workers may accept, and those that die are replaced."""
        return self.stage is Stage.SERVES

    def put_in_service(self) -> None:
        """Let its workers accept."""
        self.stage = Stage.SERVES
        os.eventfd_write(self.opening, 1)

    def close(self) -> None:
        """No worker belongs to it any more."""
        os.close(self.opening)
