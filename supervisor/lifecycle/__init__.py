"""From one configuration, or one master, to the next: reloading and upgrading.

Everything here runs in the master process, in its event loop. Imports from `processes` and the
rooms below it.
"""
