"""Command line, a module or package per command; torch is imported by the commands that compute."""
