"""Tables of what ran on a GPU."""

from tables import number, read, table

PARTS = {
    "ops": "operators: CUDA, Triton and eager against the CPU",
    "methods": "every method's step, bf16 and float32, without waiting for the GPU",
    "data": "augmentation and loaders",
    "project": "train, stop, resume, evaluate; attacks; captured graphs",
    "training": "optimisers in captured graphs",
    "compat": "the torchattacks interface",
}
OUTCOMES = ("passed", "failed", "stopped", "skipped")


def gpu_tests() -> str:
    """Outcomes of the tests that need a GPU, by folder of tests/."""
    tests = read("gpu_tests_h200")["tests"]
    rows = [
        [PARTS.get(name, name), *(str(counts.get(outcome, 0)) for outcome in OUTCOMES)]
        for name, counts in sorted(tests.items(), key=lambda item: -sum(item[1].values()))
    ]
    total = [str(sum(counts.get(outcome, 0) for counts in tests.values())) for outcome in OUTCOMES]
    return table(["Tests on a GPU", *OUTCOMES], [*rows, ["**all**", *total]])


def gpu_rates() -> str:
    """The rates that a share of the roofline is relative to."""
    prefixes = {"bytes/s": "TB/s", "FLOP/s": "TFLOP/s"}
    return table(
        ["Rate of the machine", "measured"],
        [
            [rate["what"], f"{number(rate['value'] / 1e12)} {prefixes[rate['unit']]}"]
            for rate in read("gpu_tests_h200")["rates"]
        ],
    )


TABLES = {
    "gpu-tests": (gpu_tests, ("gpu_tests_h200",)),
    "gpu-rates": (gpu_rates, ("gpu_tests_h200",)),
}
