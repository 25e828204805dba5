"""What the settings allow and nobody can have meant: one line for each, for check and the log."""

from collections.abc import Container, Iterator, Mapping

import psutil

from cpanbridge.supervisor.cgroup import Cgroups
from cpanbridge.supervisor.config import Limits, Settings
from cpanbridge.supervisor.wording import count_of

# Limits of the first daemon that did something else there: what is refused now, and what was done.
_REFUSED_NOW = {
    "limits.max_string_length": ("a longer string", "it was cut"),
    "limits.max_array_length": ("a longer array", "it was cut"),
    "limits.max_object_depth": ("data nested deeper", "nothing was done"),
    "limits.max_param_count": ("more parameters", "nothing was done"),
}

SMALLEST_REQUEST = len('{"module":"m","function":"f"}')


def warnings_about(settings: Settings, given: Container[str]) -> Iterator[str]:
    """All warnings; `given` are the keys of limits that are set, and not left at their defaults."""
    limits = settings.limits
    yield from _beyond_the_machine(given, limits)
    together = settings.worker_count * settings.thread_count
    if together < limits.max_connections:
        yield (
            f"threads = {settings.threads}: {count_of(settings.worker_count, 'worker')} together "
            f"serve {together} of the {count_of(limits.max_connections, 'connection')} that "
            "limits.max_connections allows; others wait"
        )
    if limits.max_request_size < SMALLEST_REQUEST:
        yield (
            f"limits.max_request_size = {limits.max_request_size}: no request is as small, "
            f"the smallest takes {SMALLEST_REQUEST} bytes: all are refused"
        )


def warnings_about_environment(given: Mapping[str, str], limits: Limits) -> Iterator[str]:
    """Limits that refuse calls which the first daemon ran, where a variable sets them.

    `given` are the variables that are set, with the key that each sets.
    """
    for name, key in given.items():
        limit = getattr(limits, key.rpartition(".")[2]) if key in _REFUSED_NOW else 0
        if limit:
            what, before = _REFUSED_NOW[key]
            yield (
                f"environment: {name} = {limit}: a call with {what} is refused "
                f"(InvalidRequest); in the first daemon {before}"
            )


def _beyond_the_machine(given: Container[str], limits: Limits) -> Iterator[str]:
    """Warnings about given limits that can never be reached here."""
    memory = psutil.virtual_memory().total >> 20
    if "max_memory_mb" in given and limits.max_memory_mb > memory:
        yield (
            f"limits.max_memory_mb = {limits.max_memory_mb} is more memory than this machine has "
            f"({memory} MB): it will never be reached"
        )
    cgroups = Cgroups()
    share = min((group.share for group in cgroups.memory()), default=memory << 20) >> 20
    if "max_memory_mb" in given and share < limits.max_memory_mb <= memory:
        yield (
            f"limits.max_memory_mb = {limits.max_memory_mb} is more than a cgroup allows: "
            f"{share} MB hold"
        )
    cores = cgroups.processors().usable
    if "max_cpu_percent" in given and limits.max_cpu_percent > 100 * cores:
        yield (
            f"limits.max_cpu_percent = {limits.max_cpu_percent:g} is more than may be used "
            f"here, {100 * cores:g}: it will never be reached"
        )
