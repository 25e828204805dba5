"""The configuration of a running daemon, and which changes of it need a restart.

Called in the master.
"""

from cpanbridge.supervisor.config import Load, Loaded, Settings
from cpanbridge.supervisor.memory.layout import Shared


class ReloadError(Exception):
    """A changed configuration cannot take effect without a restart; one line that says why."""


class Configuration:
    """`loaded` is the one that holds; a reload replaces it when its generation serves."""

    def __init__(self, load: Load, loaded: Loaded) -> None:
        self._load = load
        self.loaded = loaded

    def read_again(self, shared: Shared) -> Loaded:
        """The configuration as it is now, checked, for the daemon that has this shared memory.

        It does not hold yet. Raises ConfigError, ReloadError.
        """
        loaded = self._load()
        _check(self.loaded.settings, loaded.settings, shared)
        return loaded


def _check(before: Settings, settings: Settings, shared: Shared) -> None:
    most = len(shared.slots) // 2
    if settings.worker_count > most:
        raise ReloadError(
            f"workers = {settings.worker_count}: the running daemon has room for {most}; "
            "restart it to have more"
        )
    for name in ("user", "group"):
        now, then = getattr(settings, name), getattr(before, name)
        if now != then:
            raise ReloadError(
                f"{name} = {now!r}: the running daemon has {then!r} and cannot become another; "
                "restart it"
            )
    sessions = shared.header.max_sessions
    if settings.limits.max_sessions != sessions:
        raise ReloadError(
            f"limits.max_sessions = {settings.limits.max_sessions}: the running daemon has "
            f"room for {sessions}; restart it to change that"
        )
    if settings.log_file == "stderr" != before.log_file:
        raise ReloadError(
            f'log_file = "stderr": the running daemon logs to {before.log_file} and has no other '
            "standard error; restart it"
        )
