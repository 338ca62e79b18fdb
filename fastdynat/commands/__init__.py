"""The command line, one module or package per command. Parsing needs no torch; each command imports what it
runs.
"""
