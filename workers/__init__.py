"""What a worker is made of. For module authors there is one name: `current_session`."""

from cpanbridge.workers.sessions import Session, UnknownHandle, current_session

__all__ = ["Session", "UnknownHandle", "current_session"]
