"""``python -m fastdynat``."""

import sys

from fastdynat.cli import main

sys.exit(main())
