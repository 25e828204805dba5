"""The processes below the master: forking them, watching them, replacing them.

Everything here runs in the master process, in its event loop, but for `context`: what a new process
receives, and the messages that both sides exchange. Imports from `control` and the rooms below it.
"""
