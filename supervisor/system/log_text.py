"""Text for one line of the log, whatever a client or an exception has put into it."""

import json
import os
import re
import signal

TIME = "%Y-%m-%d %H:%M:%S"  # the log's format, for strftime(3)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escaped(text: str) -> str:
    """The text with control characters as escapes, so that it cannot begin another line."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """The text with lone surrogates shown as escapes, so that it can be encoded."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_line(value: object) -> str:
    """JSON in ASCII without a control character: one line for every reader."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def describe_exit(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"killed by signal {-code} ({name})"


def format_duration(seconds: float) -> str:
    """Whole hours, minutes and seconds, such as `24h 0m 0s`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}h {minute}m {second}s"
