"""World-size invariance: one process and several train the same network, with every method."""

import math
from typing import Any

import pytest
import torch
from support.method_variants import VARIANTS
from support.world_training import EPOCHS, SIZES, trained

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.methods import METHODS

NORMS = (
    PGDSpec(0.1, 0.05, 3),
    PGDSpec(0.5, 0.2, 2, norm="l2"),
    PGDSpec(5.0, 5.0, 2, norm="l1", algorithm="apgd"),
)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "weight perturbation": ("trades", {"awp": 0.01}),
    "weight perturbation of a guided method": ("dynat", {"awp": 0.01}),
    "ramp of the radius": ("trades", {"ramp": True}),
    "ramp of the radius and noise": ("n_fgsm", {"ramp": True}),
    "ramp and weight perturbation with state of images": ("madry-prior", {"ramp": True, "awp": 0.01}),
    "state of images in micro-batches": ("madry-prior", {"accumulate": 2}),
    "ramp of the radius and state of images": ("fgsm_pgi", {"ramp": True, "label_smoothing": 0.4}),
    "average and clipping": ("dynat", {"ema": 0.9, "clip_grad": 0.05}),
    "joint clipping": ("dynat", {"clip_grad": 0.05, "optimizers": "joint"}),
    "replays and perturbation kept by position": ("free-2", {"clip_grad": 0.5}),
    "unlabelled images": ("vat", {"unlabelled": True}),
    "smoothed labels": ("trades", {"label_smoothing": 0.1}),
    "smoothed labels of some images": ("vat", {"label_smoothing": 0.1, "unlabelled": True}),
    "mixed labels": ("madry", {"mixed": True}),
    "mixed and smoothed labels": ("dynat", {"mixed": True, "label_smoothing": 0.1}),
    "mixed labels of part of a batch": ("arda-quarter", {"mixed": True}),
    "mixed labels in sums over classes": ("ikl", {"mixed": True, "awp": 0.01}),
    "nesterov and decay": ("madry", {"nesterov": True, "weight_decay": 5e-3, "decay_norms": False}),
    "adamw": ("dynat", {"opt": "adamw", "lr": 5e-3, "clip_grad": 0.05, "optimizers": "joint"}),
    "a rate of the head's own, sharded": (
        "dynat",
        {"opt": "adamw", "lr": 5e-3, "head_lr_scale": 3.0, "zero1": True},
    ),
    "apgd": ("trades", {"specs": (PGDSpec(0.1, 0.1, 3, start="gaussian", algorithm="apgd"),)}),
    "random targets": ("arda-quarter", {"specs": (PGDSpec(0.1, 0.05, 3, target="random"),)}),
    "alternating norms": ("dynat", {"specs": NORMS}),
    "worst norm": ("madry", {"specs": NORMS, "norm_choice": "worst"}),
    "worst norm of the attacked images": ("arda", {"specs": NORMS, "norm_choice": "worst"}),
    "worst norm, weights by position": ("dynat-gairat", {"specs": NORMS, "norm_choice": "worst"}),
    "mean over the norms": ("dynat", {"specs": NORMS, "norm_choice": "average", "awp": 0.01}),
    "lion": ("madry", {"opt": "lion", "lr": 1e-3, "ema": 0.9}),
}


def compare(ranks, size: int, variant: str, options: dict[str, Any], tolerance: float = 1e-10) -> None:
    weights, logs = trained(variant, options)
    assert len(logs) == EPOCHS * len(SIZES) == 20
    for other, other_logs in ranks(size)(trained, variant, options):
        assert float((other - weights).abs().max()) < tolerance
        for row, other_row in zip(logs, other_logs, strict=True):
            assert row.keys() == other_row.keys()
            for key, value in row.items():
                assert math.isclose(other_row[key], value, rel_tol=1e-6, abs_tol=1e-9), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_the_network_of_one(ranks, variant: str) -> None:
    compare(ranks, 2, variant, {})


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_the_update(ranks, case: str) -> None:
    variant, options = OPTIONS[case]
    compare(ranks, 2, variant, options)


@pytest.mark.parametrize("variant", ["dynat", "trades", "free-2"])
@pytest.mark.parametrize(
    "options", [{}, {"attack_bn": "train"}, {"attack_bn": "frozen"}, {"awp": 0.01, "ema": 0.9}]
)
def test_synchronised_batch_norm(ranks, variant: str, options: dict[str, Any]) -> None:
    if variant == "free-2" and options:
        pytest.skip("free attacks by its own gradient, without weight perturbation")
    compare(ranks, 2, variant, {"norm": "batch", **options})


@pytest.mark.parametrize("variant", [name for name in METHODS if name not in ("dynat", "trades")])
def test_synchronised_batch_norm_in_every_method(ranks, variant: str) -> None:
    compare(ranks, 2, variant, {"norm": "batch"})


def test_micro_batches_of_a_synchronised_batch_norm(ranks) -> None:
    """A micro-batch has the same images at any world size, so its statistics are the same."""
    compare(ranks, 2, "dynat", {"norm": "batch", "accumulate": 2})


def test_batch_norm_of_each_rank_s_own_keeps_the_ranks_equal(ranks) -> None:
    one, other = (weights for weights, _ in ranks(2)(trained, "dynat", {"norm": "batch", "sync_bn": False}))
    assert torch.equal(one, other)
    together, _ = trained("dynat", {"norm": "batch"})
    assert float((one - together).abs().max()) > 1e-4  # another algorithm, as --help says


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dynat", "free-2", "dynat-gairat", "arda-quarter"])
def test_four_processes(ranks, variant: str) -> None:
    compare(ranks, 4, variant, {})


@pytest.mark.parametrize("variant", ["madry", "dynat", "free-2", "liet", "mail", "ikl"])
@pytest.mark.parametrize("options", [{}, {"awp": 0.01}])
def test_micro_batches_give_the_same_update(variant: str, options: dict[str, Any]) -> None:
    if options and variant in ("free-2", "liet"):
        pytest.skip("the gradient of the attack is that of the update, without weight perturbation")
    whole, logs = trained(variant, options)
    parts, part_logs = trained(variant, {**options, "accumulate": 3})
    assert float((whole - parts).abs().max()) < 1e-10
    for row, other in zip(logs, part_logs, strict=True):
        assert row.keys() == other.keys()
        assert all(math.isclose(row[key], other[key], rel_tol=1e-6, abs_tol=1e-9) for key in row)


@pytest.mark.parametrize("variant", ["madry", "ikl"])
def test_micro_batches_of_mixed_labels(variant: str) -> None:
    options = {"mixed": True, "label_smoothing": 0.1}
    whole, _ = trained(variant, options)
    parts, _ = trained(variant, {**options, "accumulate": 3})
    assert float((whole - parts).abs().max()) < 1e-10


def test_micro_batches_on_two_processes(ranks) -> None:
    whole, _ = trained("dynat", {})
    for parts, _ in ranks(2)(trained, "dynat", {"accumulate": 2}):
        assert float((whole - parts).abs().max()) < 1e-10


def test_training_moves_the_weights() -> None:
    """So that the comparisons above compare something."""
    one, _ = trained("dynat", {})
    other, _ = trained("dynat", {"lr": 0.04})
    assert float((one - other).abs().max()) > 1e-3
    assert bool(torch.isfinite(one).all())
