"""Handing a client over to the worker that has its state: both sides of it.

Runs in a worker process: `outgoing` in the thread that serves the client and in the main thread,
`incoming` in the leading thread. What checks and cleans up runs in the main thread or in either, as
the functions say. Imports from `client`.
"""
