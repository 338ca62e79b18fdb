"""Other libraries' interfaces over fastdynat's attacks."""

from fastdynat.compat.search import refresh

__all__ = ["refresh"]
