"""The control socket: the server in the master, and what the command does at its other end.

`server` runs in the master process, in its event loop; `client`, `one_call`, `top` and `screen` run
in the `cpanbridged` command. Imports from `system`, `memory`, `listening` and `config`.
"""
