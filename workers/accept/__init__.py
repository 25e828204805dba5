"""From the listen queue to a thread: accepting clients, and the threads that serve them.

Runs in a worker process: in the leading thread, and where a function says so in the worker's main
thread. Imports from `handoff`, `client` and `protocol`.
"""
