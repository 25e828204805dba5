"""The daemon's load: measured, compared with the limits, logged, and answered.

Everything here runs in the master process, in its event loop. Imports from `reports` and the rooms
below it.
"""
