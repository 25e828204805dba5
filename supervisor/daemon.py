"""One daemon, from locking its socket paths to giving them back."""

import os
from functools import partial

import msgspec

from cpanbridge.supervisor.config import UPGRADE_VARIABLE, ConfigError, Load, Loaded, Settings
from cpanbridge.supervisor.lifecycle import upgrade
from cpanbridge.supervisor.lifecycle.reload import OnDone
from cpanbridge.supervisor.lifecycle.upgrade import Estate
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.master import Master
from cpanbridge.supervisor.memory.layout import slot_capacity
from cpanbridge.supervisor.processes.context import Mains
from cpanbridge.supervisor.system import logs, privileges, rlimit
from cpanbridge.supervisor.system.logs import LogError


def serve(load: Load, mains: Mains, on_ready: OnDone) -> int:
    """Be the master, from locking the socket paths to giving them back; the exit status.

    `load` reads the configuration, now and for each reload. `on_ready` is called once: with None
    when all workers are ready, or with the reason why there is no daemon. Raises ConfigError,
    ListenError, InstanceError, LogError, PrivilegeError.
    """
    lent = listener.from_service_manager()
    load = partial(_at_lent_paths, load, [each.path for each in lent])
    loaded = load()
    settings = loaded.settings
    sockets = Sockets()
    identity = privileges.identity(settings)
    if identity is not None:
        privileges.prepare(settings, identity)
        log = logs.LogSettings.of(loaded)
        if privileges.reaches(identity, log.log_file):
            log = log._replace(log_file="stderr")
        if privileges.reaches(identity, log.security_log):
            log = log._replace(security_log="-")
        logs.configure(log)
        privileges.drop(identity)
    sockets.open(settings, lent)
    try:
        logs.configure(logs.LogSettings.of(loaded))
        for warning in loaded.warnings:
            logs.LOGGER.warning("%s", warning)
        rlimit.raise_limit(settings.limits, slot_capacity(settings.worker_count))
        return Master(load, loaded, sockets, mains, on_ready).run()
    finally:
        sockets.give_back()


def _at_lent_paths(load: Load, paths: list[str]) -> Loaded:
    """Where `listen` is not set, take the paths of the service manager's sockets."""
    loaded = load()
    if not paths or loaded.settings.listen is not None:
        return loaded
    settings = msgspec.structs.replace(loaded.settings, listen=paths)
    return msgspec.structs.replace(loaded, settings=settings)


def _check_user(settings: Settings, estate: Estate) -> None:
    """A new master is of the old one's user. Raises ConfigError for another one."""
    for name in ("user", "group"):
        now, then = getattr(settings, name), getattr(estate, name)
        if now != then:
            raise ConfigError(
                f"{name} = {now!r}: the running daemon has {then!r} and cannot become another; "
                "stop it and start it"
            )


def take_over(load: Load, mains: Mains) -> int:
    """Be the new master that another one has started; the exit status.

    The environment names the descriptor by which the two talk. Raises UpgradeError.
    """
    inherited = upgrade.inherit(int(os.environ.pop(UPGRADE_VARIABLE)))
    lent = [each.path for each in inherited.estate.sockets.listeners if each.lent]
    load = partial(_at_lent_paths, load, lent)
    if "WATCHDOG_PID" in os.environ:  # which was the old master's
        os.environ["WATCHDOG_PID"] = str(os.getpid())
    if inherited.estate.error >= 0:
        logs.inherit(inherited.estate.error)
    try:
        loaded = load()
        _check_user(loaded.settings, inherited.estate)
        logs.configure(logs.LogSettings.of(loaded))
    except (ConfigError, LogError) as error:
        upgrade.refuse(inherited.end, str(error))
        return 1
    sockets = Sockets(inherited.estate.sockets)
    try:
        return Master(load, loaded, sockets, mains, lambda _: None, inherited).run()
    finally:
        sockets.give_back()
