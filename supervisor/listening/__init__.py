"""The sockets that clients connect to: paths, locks, permissions, backlog.

Everything here runs in the master process, in its event loop; `instance` and `listener` also in the
`cpanbridged` command, which finds a running daemon by them. Imports from `config` only.
"""
