"""The sockets that clients connect to: paths, locks, permissions, backlog.

Everything here runs in the master process, in its event loop; `instance` and `listener` also in the
`cpanbridged` command, which looks for a running daemon. Imports from `config` only.
"""
