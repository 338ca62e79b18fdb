"""The embedded default: scikit-learn's 1,797 handwritten 8x8 digits, scaled up; needs no download."""

from functools import cache

import torch
from sklearn.datasets import load_digits

from fastdynat.data.image_sets import DatasetInfo, ImageSet, ImageSource, resize_square
from fastdynat.data.split import stratified_split

IMAGE_SIZE = 32
MAX_VALUE = 16  # of a stored pixel: how many of a 4x4 block of the scan are ink
TEST_SHARE = 0.2

INFO = DatasetInfo(
    name="digits",
    num_classes=10,
    image_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
    class_names=tuple("0123456789"),
    mean=(0.3059,),
    std=(0.3237,),
    # Measured in the default DYNAT run (one seed, 144 validation images): PGD-10 85.4 % without, 61.1 % with
    # random crops.
    augment="none",
)


@cache
def _all_digits() -> ImageSet:
    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / MAX_VALUE)
    images = resize_square(small.round().to(torch.uint8), IMAGE_SIZE)
    return ImageSet(images, torch.from_numpy(bunch.target).long())


def open_digits(split: str) -> ImageSource:
    """Return the "train" (1,438 images) or "test" (359) split of 1x32x32 digits, fixed and stratified."""
    everything = _all_digits()
    train, test = stratified_split(everything.labels, val_size=TEST_SHARE, limit=None, seed=0)
    chosen = train if split == "train" else test
    return ImageSource(everything.labels[chosen], lambda indices: everything.images[chosen[indices]])
