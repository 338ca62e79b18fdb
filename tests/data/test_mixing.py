"""MixUp and CutMix: labels, weights, boxes and partners, and their distributions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdynat.config import AugmentationConfig
from fastdynat.data.mixing import Blend, Mixing
from fastdynat.distributed.shares import LEAST, Share, deal

HEIGHT, WIDTH = 9, 11


def mixed(mixing: Mixing, total: int, blends: list[Blend]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(total)
    x = torch.rand(total, 3, HEIGHT, WIDTH, generator=generator)
    labels = torch.randint(mixing.num_classes, (total,), generator=generator)
    return x, labels, *mixing.apply(x, labels, Share(total), blends)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(["mixup", "cutmix"]))
def test_each_image_is_what_its_label_says(total: int, groups: int, step: int, kind: str) -> None:
    mixing = Mixing(7, groups=groups, **{kind: 1.0})
    blends = mixing.blends((0, 0, step), HEIGHT, WIDTH)
    x, labels, made, likeliest, probabilities = mixed(mixing, total, blends)
    assert torch.equal(probabilities.sum(1), torch.ones(total))
    partners = mixing.partners(Share(total))
    ends = mixing.ends(total)
    for position, partner in enumerate(partners):
        group = next(number for number in range(groups) if ends[number] <= position < ends[number + 1])
        blend = blends[group]
        if blend.box is None:
            want = x[position] * blend.weight + x[partner] * (1 - blend.weight)
        else:
            top, left, bottom, right = blend.box
            want = x[position].clone()
            want[:, top:bottom, left:right] = x[partner][:, top:bottom, left:right]
            area = (bottom - top) * (right - left)
            assert abs(blend.weight - (1 - area / (HEIGHT * WIDTH))) <= 2**-25
        assert torch.equal(made[position], want)
        of_label = torch.zeros(7)
        of_label[labels[position]] += blend.weight
        of_label[labels[partner]] += 1 - blend.weight
        assert torch.equal(probabilities[position], of_label)
        assert probabilities[position][likeliest[position]] == probabilities[position].max()


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.integers(1, 6), st.integers(1, 5))
def test_partners_are_a_permutation_within_groups_at_any_number_of_ranks(
    total: int, groups: int, ranks: int
) -> None:
    mixing = Mixing(10, mixup=1.0, groups=groups)
    partners = mixing.partners(Share(total))
    ends = mixing.ends(total)
    assert ends[0] == 0
    assert ends[-1] == total
    for begin, end in pairwise(ends):
        assert sorted(partners[begin:end]) == list(range(begin, end))
        if end - begin >= LEAST:
            assert all(partner != at for at, partner in enumerate(partners[begin:end], begin))
    for rank in range(ranks):
        share = deal(total, rank, ranks)
        needed = mixing.needed(share)
        assert needed[: share.images] == [*share.positions]
        assert len(set(needed)) == len(needed)
        assert mixing.partners(share) == [partners[position] for position in share.positions]
        assert set(mixing.partners(share)) <= set(needed)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_ranks_that_divide_half_a_group_load_no_partner_of_another(ranks: int) -> None:
    mixing = Mixing(10, cutmix=1.0, groups=4)
    assert all(len(mixing.needed(deal(512, rank, ranks))) == 512 // ranks for rank in range(ranks))


def test_weights_follow_beta() -> None:
    drawn = [
        blend.weight
        for step in range(2000)
        for blend in Mixing(10, mixup=0.8, groups=4).blends((1, 0, step), 8, 8)
    ]
    expected = np.random.default_rng(0).beta(0.8, 0.8, 100_000)
    for power in (1, 2, 4):
        assert abs(np.mean(np.power(drawn, power)) - np.mean(expected**power)) < 0.02


def test_boxes_follow_timm() -> None:
    """Mean and spread of each side of the box, and of the label's weight."""
    timm = pytest.importorskip("timm.data.mixup")
    np.random.seed(0)
    theirs = []
    for _ in range(8000):
        (top, bottom, left, right), weight = timm.cutmix_bbox_and_lam((64, 3, 30, 40), np.random.beta(1, 1))
        theirs.append([top, left, bottom, right, weight])
    ours = [
        [*(blend.box or ()), blend.weight]
        for step in range(2000)
        for blend in Mixing(10, cutmix=1.0, groups=4).blends((1, 0, step), 30, 40)
    ]
    for moment in (np.mean, np.std):
        assert np.allclose(moment(ours, axis=0), moment(theirs, axis=0), rtol=0.06)


def test_shares_of_steps() -> None:
    mixing = Mixing(10, mixup=1.0, cutmix=1.0, prob=0.7, switch_prob=0.25)
    blends = [mixing.blends((3, 1, step), 8, 8)[0] for step in range(4000)]
    unmixed = sum(blend == Blend(1.0) for blend in blends) / 4000
    cut = sum(blend.box is not None for blend in blends) / 4000
    assert unmixed == pytest.approx(0.3, abs=0.03)
    assert cut == pytest.approx(0.7 * 0.25, abs=0.03)


def test_configuration() -> None:
    config = AugmentationConfig(mixup=0.8, cutmix=1.0, mixup_prob=0.9, mixup_switch_prob=0.4, mixup_groups=2)
    assert Mixing.of(config, 5) == Mixing(5, 0.8, 1.0, 0.9, 0.4, 2)
