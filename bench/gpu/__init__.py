"""What the scripts for a GPU machine share: parts under limits, the machine, what is taken along, the archive of results.

Standard library only, since on a bare machine nothing else is sure to be there.
"""
