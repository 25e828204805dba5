"""One daemon, from locking its socket paths to giving them back."""

from collections.abc import Callable

from cpanbridge.supervisor import descriptors, logs
from cpanbridge.supervisor.config import Load
from cpanbridge.supervisor.master import Master
from cpanbridge.supervisor.place import WorkerMain
from cpanbridge.supervisor.shared import slot_capacity
from cpanbridge.supervisor.sockets import Sockets


def serve(load: Load, worker_main: WorkerMain, on_ready: Callable[[str | None], None]) -> int:
    """Be the master, from locking the socket paths to giving them back; the exit status.

    `load` reads the configuration, now and for each reload. `on_ready` is called once: with None
    when all workers are ready, or with the reason why there is no daemon. Raises ConfigError,
    ListenError, InstanceError, LogError.
    """
    loaded = load()
    settings = loaded.settings
    sockets = Sockets()
    sockets.open(settings)
    try:
        logs.configure(logs.LogSettings.of(loaded))
        for note in loaded.notes:
            logs.LOGGER.warning("%s", note)
        descriptors.raise_limit(
            settings.limits.max_connections, slot_capacity(settings.worker_count)
        )
        return Master(load, loaded, sockets, worker_main, on_ready).run()
    finally:
        sockets.close()
        sockets.close_control()
        sockets.release()
