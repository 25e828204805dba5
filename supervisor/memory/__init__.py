"""The shared memory: what the master and its workers write for each other to read.

`layout` alone knows where each part begins; most other files are one structure in it. Called from
every process and, in workers, from every thread: each field says who writes it. Imports from
`config` only.
"""
