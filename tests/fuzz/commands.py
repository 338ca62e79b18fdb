"""The commands that are tried, by the least that each needs."""

TINY = [
    "--train-size",
    "40",
    "--val-size",
    "20",
    "--batch-size",
    "20",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--quiet",
    "--model",
    "small",
]
COMMANDS: list[list[str]] = [
    ["train", "--resume", "run"],
    ["train", "--resume", "run", "--epochs", "3"],
    ["eval", "run", "--attacks", "clean,fgsm", "--num-images", "20"],
    [
        "eval",
        "run",
        "--attacks",
        "clean,fgsm",
        "--num-images",
        "20",
        "--checkpoints",
        "last",
        "--cache",
        "off",
    ],
    ["report", "run", "--no-attacks", "--out", "rep"],
    ["export", "run", "--out", "Me2026Fast.pt"],
    ["boundary", "run", "--chart", "s.svg"],
    ["train", "--method", "rslad", "--guide-from", "run", *TINY],
    ["eval", "run/best/model.safetensors"],
    ["train", *TINY, "--run-dir", "run", "--overwrite"],
]
BENCH = [
    "bench",
    "--method",
    "natural",
    "--data",
    "digits",
    "--model",
    "small",
    "--batch-size",
    "8",
    "--repeats",
    "1",
]
STARTS: dict[str, list[str]] = {
    "train": ["train", *TINY, "--run-dir", "new"],
    "resume": ["train", "--resume", "run"],
    "eval": ["eval", "run", "--attacks", "clean", "--num-images", "8"],
    "report": ["report", "run", "--no-attacks"],
    "export": ["export", "run", "--out", "Me2026Fast.pt"],
    "boundary": ["boundary", "run"],
    "compare": ["compare", "--methods", "natural", *TINY, "--attacks", "clean", "--out", "cmp"],
    "recipes": ["recipes"],
}
OWN_FLAGS = {
    "eval": "attacks eps step-size norm checkpoints weights source data data-dir image-size num-images shard "
    "batch-size device amp kernels seed cache fresh checks per-class json list-attacks",
    "report": "out num-images checkpoint batch-size data-dir device seed",
    "export": "out format checkpoint dataset paper",
    "boundary": "chart",
    "compare": "methods seeds budget-seconds set attacks out json chart",
}
SLOW = {
    "--compile",
    "--awp",
    "--boundary-speed",
    "--check-fidelity",
}  # what an accepted value of costs more than a moment
