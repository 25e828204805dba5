"""The operating system's side: event loop, signals, service manager, privileges, limits, logs.

Runs in the master process, but for `logs` and `log_text`, which every process uses, and `daemonize`,
which the command calls. Knows nothing of workers or clients. Imports from `config` only.
"""
