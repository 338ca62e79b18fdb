"""`fastdynat doctor`: what of this machine fastdynat can use, and whether its operators are right here."""
