"""The configuration of `fastdynat bench` beside the training flags."""

from dataclasses import dataclass

from fastdynat.commands.figures import PICTURES, check_picture
from fastdynat.config.value_ranges import check_values
from fastdynat.errors import UserError
from fastdynat.runs import check_results


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measurement."""

    seconds: float = 5.0
    """Seconds of timing for each row; all rows take turns, in at least 5 rounds."""
    repeats: int | None = None
    """Rounds, instead of --seconds."""
    budget: float | None = None
    """Prepare no further row once so many seconds have passed; what is left out is listed."""
    peers: bool = False
    """Also torchattacks and a plain PyTorch loop of the released DYNAT, and ours in float32 and without
    torch.compile."""
    switches: bool = False
    """Also each switch of the engine turned the other way, alone."""
    auto: bool = False
    """Instead: --amp --compile beside the four combinations of the two, and every other automatic choice of
    the CPU beside its alternatives; exits with 1 if a choice is below 0.97x of the best."""
    epoch: bool = False
    """Also one whole epoch of --data. Without it the images are random ones of its size and nothing is
    read."""
    json: str | None = None
    """Write the results to this file; until all are there, what has been measured is in PATH.partial."""
    chart: str | None = None
    """Draw the rates as bars into this .svg, .png or .pdf (extra `plots`)."""
    profile: str | None = None
    """Time of one step by kind of operation: as .json, or drawn as .svg, .png or .pdf (extra
    `plots`)."""
    baseline: str | None = None
    """A --json file of earlier, of the same settings and machine: print the ratios, exit with 1 if a row got
    slower."""
    tolerance: float = 0.1
    """Largest allowed slowdown of a row against the --baseline, as a fraction."""


def check_bench(config: BenchConfig) -> None:
    """Raise UserError for a value that cannot work; nothing is written."""
    check_values(config)
    if config.auto:
        for name in ("peers", "switches", "epoch", "chart", "profile", "baseline"):
            if getattr(config, name):
                raise UserError(f"--auto is a measurement of its own: leave --{name} out")
    check_picture("chart", config.chart)
    check_picture("profile", config.profile, (".json", *PICTURES))
    check_results((config.json,), (config.chart, config.profile))
