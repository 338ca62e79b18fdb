"""bench/studies: bootstrap, Holm's correction, calibration and verdicts against known values."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from fastdynat.commands.parsing.parse import early_flags
from fastdynat.commands.train import parse_train

STUDIES = str(ROOT / "bench" / "studies")


@pytest.fixture(scope="module")
def claim() -> Iterator[SimpleNamespace]:
    """The modules of the study."""
    sys.path.append(STUDIES)
    try:
        names = ("analysis", "design", "statistics")
        yield SimpleNamespace(**{name: import_module(f"claim_{name}") for name in names})
    finally:
        sys.path.remove(STUDIES)


def made_up(generator: np.random.Generator, seeds: int, images: int, spread: float) -> np.ndarray:
    """Paired differences with the mean 0.05; seeds differ by `spread`, half of the chance is the image's."""
    shift = 0.05 + generator.normal(0, spread, (seeds, 1))
    own, shared = generator.random((seeds, images)), generator.random(images)
    chance = np.where(generator.random((seeds, images)) < 0.5, shared, own)
    return (chance < 0.15 + shift).astype(int) - (chance > 0.85).astype(int)


@pytest.mark.parametrize(
    ("seeds", "images", "spread", "low", "high"),
    [(3, 2000, 0.0, 0.92, 1.0), (6, 600, 0.03, 0.82, 0.98), (3, 2000, 0.03, 0.74, 0.94)],
    ids=["images only", "six seeds", "three seeds that differ"],
)
def test_intervals_of_the_bootstrap_cover_the_truth(
    claim: SimpleNamespace, seeds: int, images: int, spread: float, low: float, high: float
) -> None:
    generator = np.random.default_rng(5)
    hits = []
    for _ in range(120):
        found = claim.statistics.paired(made_up(generator, seeds, images, spread), draws=400)
        hits.append(found.ci[0] <= 5.0 <= found.ci[1])
    assert low <= np.mean(hits) <= high


def test_draws_of_equal_columns_are_draws_of_images(claim: SimpleNamespace) -> None:
    generator = np.random.default_rng(2)
    values = made_up(generator, 3, 300, 0.02)
    found = claim.statistics.paired(values, draws=20_000)
    means = 100 * values.mean(1)
    draws = []
    for _ in range(20_000):
        rows = values[:, generator.integers(0, 300, 300)]
        seeds = generator.integers(0, 3, 3)
        draws.append(100 * rows.mean() + np.sqrt(1.5) * (means[seeds] - means.mean()).mean())
    assert found.mean == pytest.approx(means.mean())
    assert found.seeds == pytest.approx(means)
    assert found.ci == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.3)
    tail = min(np.mean(np.array(draws) <= 0), np.mean(np.array(draws) >= 0))
    assert found.p == pytest.approx(2 * tail, abs=0.04)


def test_a_difference_without_spread_has_an_interval_without_width(claim: SimpleNamespace) -> None:
    found = claim.statistics.paired(np.ones((3, 50)), draws=100)
    assert (found.mean, found.ci, found.p) == (100.0, (100.0, 100.0), 0.02)
    assert claim.statistics.paired(np.zeros((3, 50)), draws=100).p == 1.0
    with pytest.raises(ValueError, match="at least 2"):
        claim.statistics.paired(np.ones((1, 50)))


def test_holm_is_the_published_procedure(claim: SimpleNamespace) -> None:
    found = claim.statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert claim.statistics.holm({"a": 0.9, "b": 0.6}) == {"b": 1.0, "a": 1.0}


def test_calibration_and_entropy_of_known_labels(claim: SimpleNamespace) -> None:
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 1])
    # Bins (0.8667, 0.9333]: half right at 0.9; 0.7 and 0.6: one image each, right.
    expected = 0.5 * abs(0.5 - 0.9) + 0.25 * 0.3 + 0.25 * 0.4
    assert claim.statistics.calibration_error(probs, labels) == pytest.approx(expected)
    certain = np.eye(3)
    assert claim.statistics.calibration_error(certain, np.arange(3)) == 0
    assert claim.statistics.entropy(np.full((4, 10), 0.1)) == pytest.approx(np.log(10))
    assert claim.statistics.entropy(certain) == pytest.approx(0)


@pytest.mark.parametrize(
    ("mean", "ci", "adjusted", "seeds", "overfits", "verdict"),
    [
        (2.0, (1.2, 2.8), 0.01, (1.5, 2.0, 2.5), True, "holds"),
        (2.0, (1.2, 2.8), 0.01, (1.5, 2.0, 2.5), False, "not testable: Madry does not overfit"),
        (2.0, (0.1, 3.9), 0.01, (-0.5, 3.0, 3.5), True, "undecided"),
        (2.0, (-0.1, 3.9), 0.06, (1.5, 2.0, 2.5), True, "undecided"),
        (0.7, (0.5, 0.9), 0.001, (0.6, 0.7, 0.8), True, "does not hold"),
        (-2.0, (-2.8, -1.2), 0.01, (-1.5, -2.0, -2.5), True, "the opposite holds"),
        (-0.2, (-0.8, 0.4), 1.0, (-0.4, 0.1, -0.3), True, "does not hold"),
    ],
)
def test_a_verdict_needs_size_significance_and_agreement(
    claim: SimpleNamespace,
    mean: float,
    ci: tuple[float, float],
    adjusted: float,
    seeds: tuple[float, ...],
    overfits: bool,
    verdict: str,
) -> None:
    found = claim.statistics.Estimate(mean, ci, adjusted, seeds)
    assert claim.analysis.verdict(found, adjusted, overfits=overfits) == verdict
    assert claim.analysis.verdict(None, None) == "not enough runs yet"


def bits_of(
    shares: dict[tuple[str, str], float], seeds: tuple[int, ...]
) -> dict[tuple[str, int, str], np.ndarray]:
    """1,000 images of which the first SHARE are correct."""
    return {
        (arm, seed, role): np.arange(1000) < round(1000 * share)
        for (arm, role), share in shares.items()
        for seed in seeds
    }


def test_findings_are_the_contrasts_of_the_text(claim: SimpleNamespace) -> None:
    shares = {
        ("madry", "best"): 0.30,
        ("madry", "last"): 0.25,
        ("dynat", "best"): 0.33,
        ("dynat", "last"): 0.32,
    }
    shares |= {
        ("dynamic-update", "last"): 0.31,
        ("dynamic-attack", "last"): 0.28,
        ("true-labels", "last"): 0.25,
    }
    found = {f.name: f for f in claim.analysis.findings(bits_of(shares, (1, 2, 3)))}
    means = {name: f.estimate.mean for name, f in found.items() if f.estimate is not None}
    assert means == pytest.approx(
        {
            "H1-best": 3.0,
            "H1-last": 7.0,
            "H2": 4.0,
            "H4": 3.0,
            "gap-madry": 5.0,
            "gap-dynat": 1.0,
            "label": 5.0,
            "attack": 2.0,
            "interaction": -2.0,
        }
    )
    assert found["H2"].verdict == "holds"
    assert found["H5-trades"].verdict == "not enough runs yet"
    part = {f.name: f for f in claim.analysis.findings(bits_of(shares, (1, 2)))}
    assert (part["H1-best"].seeds, part["H1-best"].verdict) == (2, "not enough runs yet")


def test_every_hypothesis_has_its_runs_and_every_run_its_flags(claim: SimpleNamespace) -> None:
    runs = claim.design.RUNS
    assert len({run.name for run in runs}) == len(runs)
    planned = {(run.arm, run.seed) for run in runs if run.augment == "crop-flip" and run.images == 5000}
    every = {(arm, seed, role): np.zeros(4, bool) for arm, seed in planned for role in ("best", "last")}
    assert all(found.estimate is not None for found in claim.analysis.findings(every))
    for run in {(run.arm, run.model): run for run in runs}.values():
        flags = [*run.flags("data", Path("runs"), 60, {}), "--resume", "auto"]
        parse_train(flags, early_flags(flags))
    assert claim.design.equal_seconds_epochs({"madry": 10.0, "dynat": 12.0}) == 72
