"""The master, the command, and what all processes share; docs/design.md says how it fits together.

Imports nothing from `workers`, but for the command. Which process runs a room is said in each.
"""
