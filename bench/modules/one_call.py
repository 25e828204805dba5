"""Run by a script that starts a Python process per call: request on stdin, reply on stdout."""

import importlib
import json
import sys

request = json.load(sys.stdin)
echo = importlib.import_module("bench_echo").echo
json.dump({"success": True, "result": echo(**request["params"])}, sys.stdout)
