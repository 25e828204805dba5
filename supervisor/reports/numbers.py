"""What the master says of its daemon in numbers: for `cpanbridged metrics` and `cpanbridged top`.

Out of the shared memory, and quickly, since the master's loop waits meanwhile: a millisecond with a
few workers, 27 with 64 slots used and a thousand functions called in each; a step may take 50.
What is made of it for the eye or for Prometheus is made by the command. Called in the master.
"""

from typing import Any

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory import function_stats
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.reports import reports, totals


def numbers(status: dict[str, Any], settings: Settings, shared: Shared) -> dict[str, Any]:
    """The daemon as one object; `status` is what `status.py` says of it."""
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
        # Not subtracted: a difference of two counters may go back when one is read a moment later.
        "opened": sum(slot.opened for slot in shared.used_slots),
        "taken_over": sum(slot.taken_over for slot in shared.used_slots),
        "turned_away": counts.rejected,
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
