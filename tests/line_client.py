"""The program of a `ClientProcess`: it reads calls by line, and prints the replies by line.

It and `crowd.py` are started without `site`, which takes half of Python's start.
"""

import json
import sys
from typing import Any

from plain_client import Framed, request, send_one_shot


def main(path: str, form: str) -> None:
    kept: Framed | None = None
    for line in sys.stdin:
        module, function, params, fields = json.loads(line)
        reply: Any
        try:
            if form == "framed":
                kept = kept or Framed(path, 90)
                reply = kept.call(module, function, params, **fields)
                if reply is None:
                    kept = None
            else:
                body = json.dumps(request(module, function, params, **fields)).encode()
                reply = json.loads(send_one_shot(path, body, timeout=90))
        except (OSError, EOFError, ValueError) as error:
            kept = None
            reply = {"success": False, "error_type": "(lost)", "error": repr(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
