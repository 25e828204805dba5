"""The worker processes. The names here are for module authors, who begin with `current_session`.

Everything below runs in a worker, or in the template that it is forked from. It imports of
`supervisor` only what the two sides share.
"""

from cpanbridge.workers.sessions.session import (
    Session,
    SessionEnded,
    UnknownHandle,
    current_session,
)

__all__ = ["Session", "SessionEnded", "UnknownHandle", "current_session"]
