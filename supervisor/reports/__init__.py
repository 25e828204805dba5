"""The reports: the daemon's state in numbers and words, read from the shared memory.

`reports` and `health` run in a worker's client threads, for `system.*` calls; `answers` in the
master, for the control socket; `prometheus` in the command. Imports from `lifecycle` and the rooms
below it.
"""
