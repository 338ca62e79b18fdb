"""Flags of extra training images: generated or unlabelled data beside the dataset's own."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExtraConfig:
    """Extra images."""

    extra_data: str | None = None
    """Extra training images, mixed into every batch: an .npz file with the arrays image (uint8 NHWC) and
    label, a folder of such files, a .pickle of Carmon et al., a folder of class folders, or a store written
    by `fastdynat pack`. Anything but a store is packed into one first, beside the source."""
    extra_share: float = 0.7
    """Share of extra images in each batch, rounded down to whole images. It does not change the length of an
    epoch: ceil(N / batch size) updates for N images of --data, each with a full batch (Gowal et al. 2021,
    Wang et al. 2023)."""
    extra_replacement: bool = True
    """Draw extra images with replacement, as the releases do. --no-extra-replacement uses every extra image
    once before any is used again, in a new order each time."""
    extra_labels: str | None = None
    """Trained network that pseudo-labels the extra images: a run directory or .safetensors file. The labels
    are computed once and stored beside the images. Or an .npy file with one label per image."""
    extra_checksum: str | None = None
    """Expected checksum of the extra images and labels, as printed in a run's log; a run stores the checksum
    of its own."""
