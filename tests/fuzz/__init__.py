"""Damaged and odd inputs for the command line: `PYTHONPATH=tests python -m fuzz` prints the figures."""
