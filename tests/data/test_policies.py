"""Augmentation policies: torchvision's classes operation by operation, timm's magnitudes, IDBH's release."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fastdynat.config.augmentation_policy import parse_policy
from fastdynat.data.augmentation.autoaugment_tables import AUTOAUGMENT_TABLES
from fastdynat.data.augmentation.crop_shift import CropShift
from fastdynat.data.augmentation.image_operations import OPERATIONS, Resampling, apply_choices
from fastdynat.data.augmentation.magnitudes import (
    OF_AUTOAUGMENT,
    OF_RANDAUGMENT,
    OF_TRIVIALAUGMENT,
    RANDAUGMENT,
    TIMM,
    Ranges,
    timm_magnitude,
)
from fastdynat.data.augmentation.policies import (
    IDBH_RANGES,
    AutoAugment,
    ColorJitter,
    IdbhColorShape,
    Policy,
    RandAugment,
    TimmRandAugment,
    TrivialAugment,
)
from fastdynat.ops.image_draws import ImageDraws

SIZE = (20, 24)
COUNT = 3000
TORCHVISION = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}
TIMMS = {name: TORCHVISION[name] for name in TIMM if name != "solarize_add"} | {
    "solarize_add": "SolarizeAdd",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def noise(count: int = 6, size: tuple[int, int] = SIZE, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, channels, *size), generator=generator, dtype=torch.uint8)


def draws(count: int = COUNT, seed: int = 0) -> ImageDraws:
    return ImageDraws.of(seed, range(count), "cpu")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (OF_RANDAUGMENT, v2.RandAugment()),
        (OF_TRIVIALAUGMENT, v2.TrivialAugmentWide()),
        (OF_AUTOAUGMENT, v2.AutoAugment()),
    ],
    ids=["randaugment", "trivialaugment", "autoaugment"],
)
def test_operations_and_magnitudes_are_torchvisions(
    ours: Ranges, theirs: v2.Transform, channels: int
) -> None:
    images = noise(3, channels=channels)
    names = [*RANDAUGMENT] if ours.bins == 31 else [*RANDAUGMENT[1:], "invert"]
    assert {TORCHVISION[name] for name in names} == set(theirs._AUGMENTATION_SPACE)
    for name, index in product(names, range(ours.bins)):
        table, signed = theirs._AUGMENTATION_SPACE[TORCHVISION[name]]
        magnitudes = table(ours.bins, *SIZE)
        for negative in (False, True):
            value = 0.0 if magnitudes is None else float(magnitudes[index])
            value *= -1 if signed and negative else 1
            want = theirs._apply_image_or_video_transform(
                images, TORCHVISION[name], value, InterpolationMode.NEAREST, theirs._fill
            )
            magnitude = ours.magnitude(name, index, negative, SIZE)
            assert torch.equal(OPERATIONS[name](images, magnitude, Resampling()), want), (name, index)


def assert_shares(counts: Counter, names: tuple[str, ...], total: int) -> None:
    assert set(counts) == set(names)
    expected = total / len(names)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize(
    ("policy", "names"),
    [(RandAugment(2, 14), RANDAUGMENT), (TrivialAugment(), RANDAUGMENT)],
    ids=["randaugment", "trivialaugment"],
)
def test_operations_and_signs_are_uniform(policy: Policy, names: tuple[str, ...]) -> None:
    turns = policy.choices(draws(), SIZE)
    assert len(turns) == (2 if isinstance(policy, RandAugment) else 1)
    for turn in turns:
        assert_shares(Counter(name for name, _ in turn), names, COUNT)
        signs = Counter(magnitude > 0 for name, magnitude in turn if name == "rotate" and magnitude != 0)
        assert signs[True] / signs.total() == pytest.approx(0.5, abs=0.12)
    if isinstance(policy, RandAugment):
        assert {abs(m) for name, m in turns[0] if name == "rotate"} == {14.0}
        assert turns[0] != turns[1]
    else:
        assert len({abs(m) for name, m in turns[0] if name == "rotate"}) == 31


@pytest.mark.parametrize("table", AUTOAUGMENT_TABLES)
def test_autoaugment_has_torchvisions_tables(table: str) -> None:
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy(table))._policies
    ours = [
        tuple((TORCHVISION[name], prob, index) for name, prob, index in steps)
        for steps in AUTOAUGMENT_TABLES[table]
    ]
    assert len(ours) == len(theirs) == 25
    for mine, published in zip(ours, theirs, strict=True):
        assert mine == tuple((name, prob, index or 0) for name, prob, index in published)


def test_autoaugment_takes_each_sub_policy_with_its_probabilities() -> None:
    policy = AutoAugment("imagenet")
    seen: dict[str, list[float]] = {"first": [], "second": []}
    for at, row in enumerate(torch.rand(4000, 4, dtype=torch.float64).tolist()):
        found = policy.choose([at % 25 / 25, *row], SIZE)
        steps = AUTOAUGMENT_TABLES["imagenet"][at % 25]
        for key, choice, (name, prob, _) in zip(seen, found, steps, strict=True):
            assert choice[0] in (name, "identity")
            seen[key].append((choice[0] == name) - prob)
    assert abs(np.mean(seen["first"])) < 0.03
    assert abs(np.mean(seen["second"])) < 0.03


@pytest.mark.parametrize("increasing", [False, True])
def test_magnitudes_are_timms(increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    listed = timm._RAND_INCREASING_TRANSFORMS if increasing else timm._RAND_TRANSFORMS
    assert [name.removesuffix("Increasing") for name in listed] == [TIMMS[name] for name in TIMM]
    for negative in (False, True):
        monkeypatch.setattr(timm, "_randomly_negate", lambda v, n=negative: -v if n else v)
        for name, full in zip(TIMM, listed, strict=True):
            for strength in (0.0, 0.3, 4.99, 5.0, 9.0, 9.7, 10.0):
                level = timm.LEVEL_TO_ARG[full]
                wanted = level(strength, {})[0] if level else 0.0
                if name.startswith("translate"):
                    wanted *= SIZE[name == "translate_x"]
                got = timm_magnitude(name, strength, negative, SIZE, increasing=increasing)
                assert got == pytest.approx(wanted, abs=1e-12)


def photograph(size: tuple[int, int] = (48, 56)) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", TIMM)
def test_operations_are_nearly_timms(name: str) -> None:
    """Pillow rounds otherwise, and counts the equalized histogram otherwise."""
    timm = pytest.importorskip("timm.data.auto_augment")
    image = photograph()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    fill = (124, 116, 104)
    for strength in (3.0, 9.0):
        for negative in (False, True):
            magnitude = timm_magnitude(name, strength, negative, (48, 56), increasing=True)
            given = () if name in ("autocontrast", "equalize", "invert") else (magnitude,)
            if name in ("translate_x", "translate_y"):
                given = (magnitude / (56 if name == "translate_x" else 48),)
            if name in ("posterize", "solarize", "solarize_add"):
                given = (int(magnitude),)
            theirs = timm.NAME_TO_OP[TIMMS[name]](
                image, *given, fillcolor=fill, resample=Image.Resampling.BILINEAR
            )
            # torchvision moves the content, Pillow the place that is read.
            moves = name.startswith("translate")
            ours = OPERATIONS[name](
                pixels, -magnitude if moves else magnitude, Resampling(bilinear=True, fill=fill)
            )
            gap = (ours[0].int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs().float()
            assert gap.median() <= 1, (name, strength)
            assert gap.mean() < 4, (name, strength)


def test_timms_form_is_read_as_timm_reads_it() -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    for text in ("rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.7-mstd101", "rand-m15-mmax20", "rand"):
        spec, theirs = parse_policy(text), timm.rand_augment_transform(text, {})
        assert spec.operations == theirs.num_layers
        assert {op.magnitude for op in theirs.ops} == {spec.magnitude}
        assert {op.prob for op in theirs.ops} == {spec.prob}
        assert {op.magnitude_max or 10 for op in theirs.ops} == {spec.most}
        assert {min(op.magnitude_std, 101) for op in theirs.ops} == {spec.spread}
        assert spec.increasing == any("Increasing" in op.name for op in theirs.ops)


def test_timms_strengths() -> None:
    policy = TimmRandAugment(2, 9.0, 0.5, 10.0, True, 0.5, (0, 0, 0))
    turns = policy.choices(draws(), SIZE)
    for turn in turns:
        changed = [choice for choice in turn if choice != ("identity", 0.0)]
        assert len(changed) / COUNT == pytest.approx(0.5, abs=0.04)
        assert_shares(Counter(name for name, _ in changed), TIMM, len(changed))
    strengths = np.array([abs(m) / 3 for turn in turns for name, m in turn if name == "rotate"])
    assert strengths.max() <= 10
    assert np.mean(strengths) == pytest.approx(9.0, abs=0.15)
    assert np.std(strengths) == pytest.approx(0.5, abs=0.08)
    uniform = TimmRandAugment(1, 6.0, 101.0, 10.0, True, 1.0, (0, 0, 0)).choices(draws(), SIZE)[0]
    strengths = np.array([abs(m) / 3 for name, m in uniform if name == "rotate"])
    assert strengths.max() < 6
    assert np.mean(strengths) == pytest.approx(3.0, abs=0.5)


def test_each_image_gets_its_own_operations() -> None:
    """Images that share an operation are changed together, and as each would be alone."""
    images = noise(60)
    for policy in (RandAugment(2, 14), TrivialAugment(), AutoAugment("cifar10"), ColorJitter(0.4)):
        found = policy.apply(images, draws(60))
        assert torch.equal(images, noise(60))
        assert found.dtype == torch.uint8
        for row in range(60):
            one = images[row : row + 1]
            for name, magnitude in policy.choose(
                draws(60).uniform(policy.numbers, dtype=torch.float64)[row].tolist(), SIZE
            ):
                one = OPERATIONS[name](one, magnitude, policy.how)
            assert torch.equal(found[row], one[0])


def test_unchanged_images_are_not_copied() -> None:
    images = noise()
    assert apply_choices(images, [("identity", 0.0)] * 6, Resampling()) is images


def test_color_jitter_is_torchvisions() -> None:
    images, jitter = noise(1), ColorJitter(0.4)
    theirs = v2.ColorJitter(0.4, 0.4, 0.4)
    for row in draws(50).uniform(6, dtype=torch.float64).tolist():
        factors = [0.6 + 0.8 * u for u in row[:3]]
        params = {
            "fn_idx": torch.tensor(sorted(range(3), key=row[3:].__getitem__)),
            **dict(zip(("brightness_factor", "contrast_factor", "saturation_factor"), factors, strict=True)),
            "hue_factor": None,
        }
        want = theirs.transform(images, params)
        got = images
        for name, factor in jitter.choose(row, SIZE):
            got = OPERATIONS[name](got, factor, jitter.how)
        assert torch.equal(got, want)
    turns = jitter.choices(draws(), SIZE)
    assert_shares(Counter(name for name, _ in turns[0]), ("brightness", "contrast", "color"), COUNT)
    strong = ColorJitter(1.5).choices(draws(), SIZE)
    factors = [factor for turn in strong for _, factor in turn]
    assert 0 <= min(factors) < 0.02
    assert 2.48 < max(factors) <= 2.5


def test_colour_and_shape_of_idbh() -> None:
    """Its release: one of eight operations; whole degrees from 1 to 10; shears of up to 0.15 either way."""
    (turn,) = IdbhColorShape().choices(draws(8000), SIZE)
    merged = Counter("lean" if name.startswith("lean") else name for name, _ in turn)
    assert_shares(merged, (*IDBH_RANGES, "autocontrast", "equalize"), 8000)
    degrees = Counter(m for name, m in turn if name == "rotate")
    assert set(degrees) == {float(d) for d in (*range(-10, 0), *range(1, 11))}
    for axis in ("x", "y"):
        leans = [m for name, m in turn if name == f"lean_{axis}"]
        assert len(leans) == pytest.approx(500, abs=80)
        assert min(map(abs, leans)) >= 0.05
        assert max(map(abs, leans)) <= 0.15
        assert np.mean(np.sign(leans)) == pytest.approx(0, abs=0.2)
    for name, (least, most) in IDBH_RANGES.items():
        if name not in ("lean", "rotate"):
            values = [m for which, m in turn if which == name]
            assert least <= min(values) < least + 0.02
            assert most - 0.02 < max(values) <= most
    images = noise()
    want = F.affine(images, 0.0, [0, 0], 1.0, [math.degrees(0.1), 0.0])
    assert torch.equal(OPERATIONS["lean_x"](images, 0.1, Resampling()), want)


def test_crop_shift_is_a_crop_and_a_crop_of_its_padding() -> None:
    images = noise(200, (20, 24))
    found = CropShift().apply(images, draws(200))
    seen = Counter()
    for image, made, row in zip(images, found, draws(200).uniform(6, dtype=torch.float64), strict=True):
        u = row.tolist()
        total = int(u[0] * 11)
        x = int(u[1] * (total + 1))
        y = total - x
        seen[total] += 1
        cut = F.crop(image, int(u[2] * (y + 1)), int(u[3] * (x + 1)), 20 - y, 24 - x)
        # At the place u of the black image: the release crops the padded cut at the place 1 - u.
        want = F.pad(cut, [int(u[5] * (x + 1)), int(u[4] * (y + 1))])[..., :20, :24]
        want = F.pad(want, [0, 0, 24 - want.shape[-1], 20 - want.shape[-2]])
        assert torch.equal(made, want)
    assert set(seen) == set(range(11))
    assert images.equal(noise(200, (20, 24)))
