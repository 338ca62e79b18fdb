"""`fastdynat eval`: networks under the same attacks, as tables and as JSON."""
