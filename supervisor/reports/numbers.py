"""The daemon's numbers, as the master sends them for `cpanbridged metrics` and `cpanbridged top`.

They are read from the shared memory, and quickly, because the master's loop waits meanwhile: in a
millisecond with a few workers, in 27 with 64 slots used and a thousand functions called in each; a
step may take 50. The command formats them, for a terminal or for Prometheus. Called in the master.
"""

from typing import Any

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory import function_stats
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.reports import reports, totals


def numbers(status: dict[str, Any], settings: Settings, shared: Shared) -> dict[str, Any]:
    """All numbers as one object; `status` is the object of `status.status`."""
    counts = totals.count(shared)
    function_stats_of_all = [
        statistics.function_stats for statistics in shared.statistics[: shared.header.slots_used]
    ]
    return {
        "status": status,
        "metrics": reports.numbers(shared, settings),
        "start_time": shared.header.started_at / 1e9,
        "limits": {each.kind.name.lower(): each.limit for each in totals.readings(shared)},
        "busy_seconds": counts.busy_ns / 1e9,
        # Not subtracted: the difference of two counters that are read one after the other may fall.
        "opened": sum(slot.accepted + slot.taken_over for slot in shared.used_slots),
        "taken_over": sum(slot.taken_over for slot in shared.used_slots),
        "rejected": counts.rejected,
        "security_events": counts.security_events,
        "functions": [
            {
                "name": each.name,
                "calls": each.calls,
                "failed": each.failed,
                "busy_seconds": each.busy_ns / 1e9,
            }
            for each in function_stats.counts(shared.names.all(), function_stats_of_all)
        ],
        "recent_errors": reports.recent_errors(shared),
    }
