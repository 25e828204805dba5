"""Bytes to requests, and replies to bytes. Nothing here touches a socket.

Runs in a worker process, in the thread that serves the client. Imports nothing from other rooms.
"""
