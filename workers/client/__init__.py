"""One client's connection: its socket, its process, how it is read, kept alive, drained and closed.

Runs in a worker process, in the thread that serves the client; `draining` also in the worker's main
thread. Imports from `protocol` only.
"""
