"""Random images that cost a processor what photographs do: smooth, noisy, all 256 values, few zeros."""

import torch
import torch.nn.functional as F

from fastdynat.data import DatasetInfo, TrainSplit
from fastdynat.data.image_sets import ImageSource

NUM_BATCHES = 32


def random_split(info: DatasetInfo, batch_size: int, seed: int, batches: int = NUM_BATCHES) -> TrainSplit:
    """Training images for `batches` full batches, of `info`'s size, randomly labelled; nothing held out."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = info.image_shape
    number = batches * batch_size
    coarse = torch.rand(number, channels, max(1, height // 8), max(1, width // 8), generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    noise = torch.randn(smooth.shape, generator=generator)
    images = (255 * (smooth + 0.05 * noise)).round().clamp(0, 255).to(torch.uint8)
    labels = torch.randint(info.num_classes, (number,), generator=generator)
    everything = torch.arange(number)
    return TrainSplit(info, ImageSource(labels, lambda indices: images[indices]), everything, everything[:0])
