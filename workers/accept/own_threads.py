"""The daemon's own threads in a worker, told from those of its modules.

A thread of the daemon's waits for something nearly all the time. One that a module has started, or
that runs its code aside, may keep the interpreter lock for as long as it likes.
"""

import threading


class _Count:
    """How many of the daemon's own threads run now, besides the main thread."""

    lock = threading.Lock()
    value = 0

    @classmethod
    def change(cls, by: int) -> None:
        with cls.lock:
            cls.value += by


class OwnThread(threading.Thread):
    """A thread of the daemon's own, that runs no module's code but in calls."""

    def run(self) -> None:
        _Count.change(+1)
        try:
            super().run()
        finally:
            _Count.change(-1)


def there_are_others() -> bool:
    """Whether there may be other threads than the daemon's own, as far as `threading` knows."""
    return threading.active_count() > 1 + _Count.value
