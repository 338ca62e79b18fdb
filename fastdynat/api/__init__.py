"""The two calls of the library that are commands elsewhere: `fastdynat.train` and `fastdynat.evaluate`."""
