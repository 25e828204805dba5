"""The control socket: its server in the master, and its clients in the `cpanbridged` command.

`server` runs in the master process, in its event loop; `client`, `search`, `one_call`, `top` and
`screen` run in the command, `peer` in both. Imports from `system` and the rooms below it.
"""
