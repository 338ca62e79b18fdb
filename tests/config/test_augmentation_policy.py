"""The value of --aa: what is read, and what is refused."""

import pytest

from fastdynat.config import AugmentationConfig, DataConfig
from fastdynat.config.augmentation_policy import PolicySpec, parse_policy
from fastdynat.config.train_checks import check_augmentation
from fastdynat.errors import UserError


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", PolicySpec("none")),
        ("randaugment", PolicySpec("randaugment", 2, 9)),
        ("randaugment:3:14", PolicySpec("randaugment", 3, 14)),
        ("trivialaugment", PolicySpec("trivialaugment")),
        ("autoaugment", PolicySpec("autoaugment")),
        ("autoaugment:svhn", PolicySpec("autoaugment", table="svhn")),
        ("rand-m9-mstd0.5-inc1", PolicySpec("rand", 2, 9, spread=0.5, increasing=True)),
        ("rand-n3-m7-p0.3-mmax30", PolicySpec("rand", 3, 7, most=30, prob=0.3)),
        ("idbh-strong", PolicySpec("idbh-strong")),
    ],
)
def test_read(text: str, spec: PolicySpec) -> None:
    assert parse_policy(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randaugment2", "unknown policy 'randaugment2': did you mean 'randaugment'"),
        ("randaugment:2:31", "aa randaugment:2:31: N must be between 1 and 16 and M between 0 and 30"),
        ("randaugment:0:3", "N must be between 1"),
        ("randaugment:two", "randaugment does not take two; write none, randaugment:N:M"),
        ("trivialaugment:3", "trivialaugment does not take 3"),
        ("autoaugment:mnist", "autoaugment does not take mnist"),
        ("rand-m9-w0", "aa rand-m9-w0: cannot read 'w0'"),
        ("rand-m9-m8", "cannot read 'm8'"),
        ("rand-m9.5", "m, n, mmax and inc are whole numbers"),
        ("rand-m9-p1.5", "p at most 1"),
        ("rand-n0", "n is between 1 and 16"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_policy(text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_policy_with_crops_of_its_own_takes_no_others() -> None:
    for augment in ("auto", "flip", "none"):
        check_augmentation(AugmentationConfig(aa="idbh-weak"), DataConfig(augment=augment))  # type: ignore[arg-type]
    check_augmentation(AugmentationConfig(aa="trivialaugment"), DataConfig(augment="crop-flip"))
    with pytest.raises(UserError, match=r"aa idbh-weak crops the images itself; leave --augment"):
        check_augmentation(AugmentationConfig(aa="idbh-weak"), DataConfig(augment="crop-flip"))
    with pytest.raises(UserError, match=r"^scale 0.08 1 crops the images itself; leave --augment crop out"):
        check_augmentation(AugmentationConfig(scale=(0.08, 1.0)), DataConfig(augment="crop"))
    with pytest.raises(UserError, match=r"^scale 0.5 1 and aa idbh-weak both crop the images"):
        check_augmentation(AugmentationConfig(scale=(0.5, 1.0), aa="idbh-weak"), DataConfig())


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        *(("scale", ends) for ends in [(0.5,), (0.0, 1.0), (0.9, 0.5), (0.5, 1.5)]),
        *(("ratio", ends) for ends in [(1.0, 101.0), (float("nan"), 1.0), (), (1.0, 2.0, 3.0)]),
    ],
)
def test_ends_of_ranges(name: str, ends: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=f"^{name} must be two numbers"):
        check_augmentation(AugmentationConfig(**{name: ends}), DataConfig())  # type: ignore[arg-type]
