"""What the daemon says of itself, in numbers and words, read from the shared memory.

Runs wherever somebody asks: in a worker's client threads, in the master for the control socket, and
in the command (`prometheus`). Imports from `memory` and `system`.
"""
