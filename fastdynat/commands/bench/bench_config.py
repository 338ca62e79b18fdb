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
    """Number of timing rounds, instead of --seconds."""
    budget: float | None = None
    """Start no new row after this many seconds; skipped rows are listed."""
    peers: bool = False
    """Also time torchattacks, a plain PyTorch loop of the released DYNAT, and fastdynat in float32 and
    without torch.compile."""
    switches: bool = False
    """Also time the setting with each switch of the engine flipped, one at a time."""
    auto: bool = False
    """Instead, time the automatic choices against their alternatives: --amp --compile against the four
    combinations of the two, and every other automatic choice on the CPU. Exit code 1 if a choice reaches less
    than 0.97 of the best rate."""
    epoch: bool = False
    """Also time one whole epoch of --data. Without this flag, images are random, of the size of --data, and
    no data is read."""
    json: str | None = None
    """Write the results to this file; until all rows are done, PATH.partial holds those measured so far."""
    chart: str | None = None
    """Draw the rates as a bar chart into this .svg, .png or .pdf (extra `plots`)."""
    profile: str | None = None
    """Write the time of one step by kind of operation to this file: .json, or a chart as .svg, .png or .pdf
    (extra `plots`)."""
    baseline: str | None = None
    """An earlier --json file of the same settings and machine: print the ratios; exit code 1 if a row got
    slower or no longer passes its check."""
    tolerance: float = 0.1
    """Largest allowed slowdown of a row against the --baseline, as a fraction."""


def check_bench(config: BenchConfig) -> None:
    """Raise UserError for a value that cannot work; nothing is written."""
    check_values(config)
    if config.auto:
        for name in ("peers", "switches", "epoch", "chart", "profile", "baseline"):
            if getattr(config, name):
                raise UserError(f"--auto is a separate measurement: leave --{name} out")
    check_picture("chart", config.chart)
    check_picture("profile", config.profile, (".json", *PICTURES))
    check_results((config.json,), (config.chart, config.profile))
