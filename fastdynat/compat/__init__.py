"""Other libraries' interfaces over fastdynat's attacks."""

from fastdynat.compat.inner_attack import refresh

__all__ = ["refresh"]
