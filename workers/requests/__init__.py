"""One request: finding its function, its admission, its call, its time limit, its statistics.

Runs in a worker process, in the thread that serves the client; `timeouts` also in the main thread.
Imports from `modules`, `client` and `protocol`.
"""
