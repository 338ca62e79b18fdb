"""`fastdynat report`: runs as one HTML page with pictures (extra `plots`)."""
