"""The Python modules that clients may call: importing them, finding and calling a function.

Importing runs in the template or, for what it leaves out, in a worker's main thread before it
serves. Calls run in a worker's client threads. Imports from `client` and `protocol`.
"""
