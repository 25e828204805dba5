"""What a script runs that starts a Python for each call: a request on stdin, a reply on stdout."""

import importlib
import json
import sys

request = json.load(sys.stdin)
echo = importlib.import_module("bench_echo").echo
json.dump({"success": True, "result": echo(**request["params"])}, sys.stdout)
