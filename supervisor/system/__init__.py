"""The operating system's side: event loop, signals, service manager, privileges, limits, logs.

Runs in the master process, except `logs` and `log_text`, which every process uses, and `daemonize`,
which the command uses. Nothing here knows what workers and clients do. Imports from `gate`,
`listening` and `config`.
"""
