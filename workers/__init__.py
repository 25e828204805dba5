"""What a worker is made of. For module authors there is one name: `current_session`."""

from cpanbridge.workers.sessions.sessions import (
    Session,
    SessionEnded,
    UnknownHandle,
    current_session,
)

__all__ = ["Session", "SessionEnded", "UnknownHandle", "current_session"]
