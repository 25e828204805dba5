"""Handing a client over to the worker that has its state: both sides of it.

Runs in a worker process: `outgoing` in the thread that serves the client and in the main thread,
`incoming` in the leading thread. Imports from `client`.
"""
