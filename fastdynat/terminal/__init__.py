"""The terminal: consoles, progress bars and signals."""
