"""One daemon, from locking its socket paths to giving them back."""

import os
from collections.abc import Callable

from cpanbridge.supervisor import descriptors, logs, upgrade
from cpanbridge.supervisor.config import ConfigError, Load
from cpanbridge.supervisor.logs import LogError
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


def take_over(load: Load, worker_main: WorkerMain) -> int:
    """Be the new master that another one has started; the exit status.

    The other one has said in the environment where it is to be heard. Raises UpgradeError.
    """
    inherited = upgrade.inherit(int(os.environ.pop(upgrade.VARIABLE)))
    try:
        loaded = load()
        logs.configure(logs.LogSettings.of(loaded))
    except (ConfigError, LogError) as error:
        upgrade.refuse(inherited.end, str(error))
        return 1
    sockets = Sockets(inherited.estate.sockets)
    try:
        return Master(load, loaded, sockets, worker_main, lambda _: None, inherited).run()
    finally:
        sockets.close()
        sockets.close_control()
        sockets.release()
