"""``python -m fastdynat``."""

import sys

from fastdynat.commands.main import main

sys.exit(main())
