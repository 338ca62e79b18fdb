"""Means of an epoch over some of its images, such as the labelled ones, against one mean over all of them."""

from typing import Any

import pytest
import torch
from support.stepping import EPS, make_batch, moved_network, train_step
from torch import Tensor

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch
from fastdynat.distributed import world
from fastdynat.distributed.shares import deal
from fastdynat.methods import Dyart, DyartOptions, GradAlign, GradAlignOptions, Vat, VatOptions, logged_mean
from fastdynat.training.metrics import Averages
from fastdynat.training.micro_batches import joined_logs, micro_batches
from fastdynat.training.step import TrainStep

SIZES = (9, 8, 4, 2)
CPU = torch.device("cpu")


def values_and_chosen() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(sum(SIZES), generator=generator) < 0.4
    chosen[:9], chosen[9:17] = False, torch.arange(8) == 3  # none, and one, of the larger batches
    return torch.rand(sum(SIZES), dtype=torch.float64, generator=generator), chosen


def epoch(pieces: int) -> Averages:
    """This process's averages of batches that are cut into `pieces`."""
    values, chosen = values_and_chosen()
    here, found = world(), Averages()
    for rows in torch.arange(sum(SIZES)).split(SIZES):
        share = deal(len(rows), here.rank, here.size, pieces)
        own = rows[[*share.positions]]
        batch = Batch(own.double().view(-1, 1, 1, 1), own, own, share)
        parts = [part for part, _ in micro_batches(batch, pieces)]
        logs = [logged_mean("m", values[part.labels], chosen[part.labels]) for part in parts]
        found.add(joined_logs(logs, parts), share.images / share.copies)
    return found


def means_of_all(pieces: int) -> dict[str, float]:
    return epoch(pieces).of_all(world()).means()


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_mean_over_some_images_is_over_all_of_the_epoch_s(ranks: Any, pieces: int) -> None:
    values, chosen = values_and_chosen()
    want = {"m": pytest.approx(float(values[chosen].mean()))}
    assert means_of_all(pieces) == want
    for found in ranks(2)(means_of_all, pieces):
        assert found == want


def test_averages_go_on_from_a_state_of_this_and_of_an_earlier_version() -> None:
    found = Averages()
    found.load_state_dict(epoch(1).state_dict(), CPU)
    assert found.means() == epoch(1).means()
    # Earlier versions stored means over all images of a batch: 10 of them, with the mean 0.5.
    found.load_state_dict({"images": 10, "sums": {"m": torch.tensor(5.0)}, "counts": {"m": 10}}, CPU)
    found.add(logged_mean("m", torch.tensor([2.0, 9.0]), torch.tensor([True, False])), 2)
    assert found.means() == {"m": pytest.approx((5 + 2) / 11)}


def test_an_epoch_without_such_images_has_no_mean() -> None:
    found = Averages()
    found.add(logged_mean("m", torch.ones(3), torch.zeros(3, dtype=torch.bool)), 3)
    assert found.means() == {}


def means_of(step: TrainStep, *batches: Batch) -> dict[str, float]:
    found = Averages()
    for batch in batches:
        found.add(step(batch), len(batch.labels))
    return found.means()


def test_a_batch_without_labels_does_not_lower_the_accuracy() -> None:
    """A network that is right everywhere, and does not move."""
    batch, model = make_batch(), moved_network(1)
    for parameter in model[-1].parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model[-1].bias[2] = 5.0
    right = torch.full_like(batch.labels, 2)
    some = right.where(torch.arange(len(right)) < 3, -1)
    step = train_step(Vat(VatOptions()), model, None, lr=1e-12)
    batches = [Batch(batch.x, labels, batch.indices) for labels in (some, torch.full_like(right, -1))]
    assert means_of(step, *batches)["train_acc"] == 1.0


def test_a_batch_without_boundary_points_does_not_shorten_the_distance() -> None:
    batch, model = make_batch(), moved_network(1)
    predicted = model.eval()(batch.x)
    right, wrong = (Batch(batch.x, p.argmax(1), batch.indices) for p in (predicted, -predicted))
    found = []
    for batches in ((right,), (right, wrong)):
        network = moved_network(1)
        spec = PGDSpec(EPS, 0.01, 20)
        found.append(
            means_of(train_step(Dyart(DyartOptions()), network, None, spec=spec, lr=1e-12), *batches)
        )
    assert found[0]["boundary_found"] > 0
    assert found[1]["boundary_found"] == found[0]["boundary_found"] / 2
    assert found[1]["boundary_distance"] == pytest.approx(found[0]["boundary_distance"], rel=1e-6)


def test_a_batch_without_gradients_does_not_lower_the_misalignment() -> None:
    batch = make_batch()
    step = train_step(GradAlign(GradAlignOptions()), moved_network(1), None, spec=PGDSpec(EPS, EPS, 1))
    logs = step(batch)
    found = Averages()
    found.add(logs, 8)
    found.add({key: torch.zeros_like(value) for key, value in logs.items()}, 8)
    assert found.means()["misalignment"] == pytest.approx(float(logs["misalignment"]))
