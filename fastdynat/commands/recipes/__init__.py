"""`fastdynat recipes`: the published protocols as a table, and one of them with its cost on this machine."""
