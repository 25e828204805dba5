"""State that outlives a call: which worker has it, and how long it is kept.

Runs in a worker process, in the thread that serves the client; `sessions` has one thread of its
own, which waits for the ends of client processes. Imports from `requests`, `handoff` and the rooms
below.
"""
