"""One client's connection: its socket, who it is, how it waits, and how it ends.

Runs in a worker process, in the thread that serves the client; `draining` also in the worker's main
thread. Imports from `protocol` only.
"""
