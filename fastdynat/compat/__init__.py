"""Other libraries' interfaces over fastdynat's attacks."""
