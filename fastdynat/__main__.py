"""``python -m fastdynat``."""

import sys

from fastdynat.commands.main import program

sys.exit(program())
