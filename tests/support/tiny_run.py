"""Flags of a training that takes a second."""

TINY = [
    "--train-size",
    "200",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "2",
    "--epochs",
    "4",
    "--quiet",
]
