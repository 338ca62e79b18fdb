"""Command-line parsing: arguments to configuration, without importing torch."""
