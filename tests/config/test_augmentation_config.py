"""Augmentation that cannot be had: refused in one line."""

import dataclasses

import pytest

from fastdynat.config import AugmentationConfig, DataConfig, TrainConfig
from fastdynat.config.train_checks import check_train_config
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.methods import options_type
from fastdynat.training.resolve import resolve

INFO = DatasetInfo("cifar10", 10, (3, 32, 32), tuple("0123456789"), (0.5,) * 3, (0.2,) * 3, "crop-flip")


def config(method: str = "madry", data: DataConfig | None = None, **values: object) -> TrainConfig:
    return TrainConfig(
        method=method,
        options=options_type(method)(),
        data=data or DataConfig(),
        augmentation=AugmentationConfig(**values),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup": -1.0}, r"mixup must be an alpha >= 0, 0 for none, got -1 \(usual: 0.8 and 1.0\)"),
        ({"cutmix": float("nan")}, "cutmix must be an alpha >= 0"),
        ({"mixup": 1e4}, "mixup must be at most 1000, got 10000"),
        ({"reprob": 1.5}, r"reprob must be in \[0, 1\], got 1.5"),
        ({"mixup": 1.0, "mixup_prob": -0.1}, r"mixup_prob must be in \[0, 1\], got -0.1"),
        ({"mixup": 1.0, "mixup_groups": 0}, "mixup_groups must be a number of groups >= 1, got 0"),
        ({"cutout": -2}, "cutout must be a number of pixels per side, 0 for none, got -2"),
    ],
)
def test_ranges(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_train_config(config(**values))


def test_hidden_labels_are_not_mixed() -> None:
    with pytest.raises(UserError, match=r"^cutmix 1: with labelled 100, unlabelled images have no label"):
        resolve(config("vat", DataConfig(labelled=100), cutmix=1.0), INFO, announce=False)


def test_groups_have_two_images() -> None:
    data = DataConfig(batch_size=10)
    resolve(config("madry", data, cutmix=1.0, mixup_groups=5), INFO, announce=False)
    with pytest.raises(UserError, match=r"^mixup_groups 6: a batch of 10 images has at most 5 groups"):
        resolve(config("madry", data, cutmix=1.0, mixup_groups=6), INFO, announce=False)


def test_a_method_of_one_class_per_image_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^mixup 0.8: method gairat needs one class per image"):
        resolve(config("gairat", mixup=0.8), INFO, announce=False)


@pytest.mark.parametrize("field", dataclasses.fields(AugmentationConfig), ids=lambda field: field.name)
def test_the_default_augments_nothing_more(field: dataclasses.Field) -> None:
    assert getattr(resolve(config(), INFO, announce=False).augmentation, field.name) == field.default
