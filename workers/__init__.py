"""The worker processes. The names here are for module authors, who begin with `current_session`."""

from cpanbridge.workers.sessions.session import (
    Session,
    SessionEnded,
    UnknownHandle,
    current_session,
)

__all__ = ["Session", "SessionEnded", "UnknownHandle", "current_session"]
