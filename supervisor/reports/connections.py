"""The open connections, and what each is doing: `system.connections`.

Called in a worker's client thread, some also in the master.
"""

import time
from typing import Any

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory.connection_table import STATUS_NAMES
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.reports import totals
from cpanbridge.supervisor.reports.times import age, iso_time, wall_time
from cpanbridge.supervisor.reports.totals import Listed


def connections(shared: Shared, settings: Settings) -> dict[str, Any]:
    """`system.connections`: the open connections, and what each is doing."""
    counts = totals.count(shared)
    return {
        "total_connections": counts.accepted,
        "current_connections": counts.connections,
        "active_connections": counts.connections,
        "stale_connections": len(stale_connections(shared, settings)),
        "connections": [describe_connection(each, settings) for each in totals.connections(shared)],
        "connection_limits": {
            "max_concurrent": shared.header.max_connections,
            "max_concurrent_requests": shared.header.max_concurrent_requests,
            "stale_timeout": settings.limits.stale_timeout,
        },
    }


def describe_connection(each: Listed, settings: Settings) -> dict[str, Any]:
    """One connection in the reports."""
    connection = each.connection
    stale = connection.is_stale(time.monotonic_ns(), settings.limits.stale_timeout)
    opened, active = wall_time(connection.opened_at), wall_time(connection.last_activity)
    return {
        "connection_id": each.id,
        "worker": each.slot,
        "start_time": opened,
        "start_time_iso": iso_time(opened),
        "duration_seconds": age(connection.opened_at),
        "requests_count": connection.requests,
        "last_activity": active,
        "last_activity_iso": iso_time(active),
        "idle_time": age(connection.last_activity),
        "status": "stale" if stale else STATUS_NAMES[connection.status],
    }


def stale_connections(shared: Shared, settings: Settings) -> list[Listed]:
    """The connections whose clients have been silent for `stale_timeout`."""
    now, limit = time.monotonic_ns(), settings.limits.stale_timeout
    return [each for each in totals.connections(shared) if each.connection.is_stale(now, limit)]
