"""The wire protocol: bytes to requests, and replies to bytes. Nothing here uses a socket.

Runs in a worker process, in the thread that serves the client. Imports no other room of the
workers.
"""
