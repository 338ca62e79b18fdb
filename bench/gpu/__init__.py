"""Shared code of the scripts for a GPU machine: timed parts, the machine, the pack, the archive of results.

Standard library only, since on a bare machine nothing else is sure to be there.
"""
