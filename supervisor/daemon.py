"""One daemon, from locking its socket paths to giving them back."""

import contextlib
import resource
from collections.abc import Callable

from cpanbridge.supervisor import listener, logs
from cpanbridge.supervisor.config import Loaded, Settings
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.instance import Instance
from cpanbridge.supervisor.listener import Listener
from cpanbridge.supervisor.master import Master
from cpanbridge.supervisor.place import WorkerMain
from cpanbridge.supervisor.shared import slot_capacity

_SPARE_DESCRIPTORS = 128


def serve(
    loaded: Loaded,
    worker_main: WorkerMain,
    on_ready: Callable[[str | None], None],
    *,
    follow_link: bool = True,
) -> int:
    """Be the master, from locking the socket paths to giving them back; the exit status.

    `on_ready` is called once: with None when all workers are ready, or with the reason why there is
    no daemon. `follow_link` is of `log_file`, as in `logs.configure`. Raises ListenError,
    InstanceError, LogError.
    """
    settings = loaded.settings
    for path in settings.sockets:
        listener.prepare_folder(path, create=settings.listen is None)
    instance = Instance(settings.sockets)
    instance.acquire()
    listeners: list[Listener] = []
    try:
        logs.configure(
            settings.log_file,
            settings.security_log,
            settings.log_format,
            settings.debug,
            follow_link=follow_link,
        )
        for note in loaded.notes:
            logs.LOGGER.warning("%s", note)
        _raise_descriptor_limit(settings)
        mode = int(settings.socket_mode, 8)
        for path in settings.sockets:
            listeners.append(listener.listen(path, mode, settings.socket_group, instance.unclean))
        return Master(settings, loaded.source, listeners, worker_main, on_ready).run()
    finally:
        for each in listeners:
            each.unlink()
        instance.release()


def _raise_descriptor_limit(settings: Settings) -> None:
    bells = len(Bells._fields) * slot_capacity(settings.worker_count)
    needed = settings.limits.max_connections + bells + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    if hard < needed:
        logs.LOGGER.warning(
            "limits.max_connections = %d needs %d file descriptors, but only %d are allowed: "
            "raise the limit (ulimit -n, LimitNOFILE=)",
            settings.limits.max_connections,
            needed,
            hard,
        )
