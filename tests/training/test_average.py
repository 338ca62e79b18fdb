"""The weight average against its definition in float64, and its treatment of buffers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdynat.training.average import AverageRule, WeightAverage


def shake(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Move every tensor of `model`; returns copies of them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
            else:
                tensor.fill_(3 * step + 1)
    return copy.deepcopy(model.state_dict())


@settings(deadline=None, max_examples=20)
@given(decay=st.floats(0.01, 0.999), warmup=st.integers(0, 6), steps=st.integers(1, 20))
def test_equals_the_published_rule(decay: float, warmup: int, steps: int) -> None:
    """Gowal et al.: a copy in the warm-up, then min(decay, (1 + s) / (10 + s)); else torch's average."""
    model = tiny_cnn(dtype=torch.float64)
    average = WeightAverage(model, AverageRule(decay))
    average.restart(AverageRule(decay, warmup=warmup))
    expected: dict[str, Tensor] = {}
    for step in range(steps):
        new = shake(model, step)
        average.update()
        since = step - warmup
        keep = 0.0 if since < 0 or step == 0 else min(decay, (1 + since) / (10 + since)) if warmup else decay
        for key, value in new.items():
            moves = value.is_floating_point() and step > 0
            expected[key] = keep * expected[key] + (1 - keep) * value if moves else value
    assert average.updates == steps
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)


def test_without_a_warm_up_it_is_torchs_average_to_the_last_bit() -> None:
    model = tiny_cnn()
    ours, theirs = (
        WeightAverage(model, AverageRule(0.9)),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    for step in range(4):
        shake(model, step)
        ours.update()
        theirs.update_parameters(model)
    other = theirs.module.state_dict()
    for key, value in ours.module.state_dict().items():
        assert torch.equal(value, model.state_dict()[key] if "num_batches" in key else other[key]), key


@pytest.mark.parametrize("copied", [False, True])
def test_running_statistics_are_averaged_or_the_models_own(copied: bool) -> None:
    model = tiny_cnn()
    average = WeightAverage(model, AverageRule(0.5), copy_buffers=copied)
    for step in range(3):
        shake(model, step)
        average.update()
    mine, raw = average.module.state_dict(), model.state_dict()
    assert torch.equal(mine["1.running_mean"], raw["1.running_mean"]) == copied
    assert torch.equal(mine["1.num_batches_tracked"], raw["1.num_batches_tracked"])
    assert not torch.equal(mine["1.weight"], raw["1.weight"])


def test_a_restart_forgets_the_past() -> None:
    model = tiny_cnn()
    average = WeightAverage(model, AverageRule(0.99))
    for step in range(3):
        shake(model, step)
        average.update()
    average.restart(AverageRule(0.99, warmup=2))
    new = shake(model, 9)
    average.update()
    assert all(torch.equal(value, new[key]) for key, value in average.module.state_dict().items())
    assert (average.updates, average.keep_rate()) == (1, 0.0)


def test_a_network_without_buffers_is_averaged() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, AverageRule(0.5))
    before = shake(model, 0)["weight"]
    average.update()
    after = shake(model, 1)["weight"]
    average.update()
    torch.testing.assert_close(average.module.weight, (before + after) / 2)
