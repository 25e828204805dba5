"""What each subcommand of `cpanbridged` does, from its parsed options to its exit status.

Everything here runs in the `cpanbridged` command; `run` becomes the master process, and `start` and
`restart` fork it. No other room of the supervisor imports from `workers`, `reports.prometheus` or
`control.top`. Imports from `daemon` and everything below it.
"""
