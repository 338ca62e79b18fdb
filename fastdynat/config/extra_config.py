"""Flags of extra training images: generated or unlabelled data beside the dataset's own."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExtraConfig:
    """Extra images."""

    extra_data: str | None = None
    """Extra training images that complete every batch: an .npz file with the arrays image (uint8 NHWC) and
    label, a folder of such parts, a .pickle of Carmon et al., a folder of class folders, or a store of
    `fastdynat pack`. Other forms are packed once, into a store beside them."""
    extra_share: float = 0.7
    """Share of each batch that is extra images, rounded down to whole images. An epoch keeps its length,
    ceil(N / batch size) updates for N images of --data, each with a full batch (Gowal et al. 2021, Wang et
    al. 2023)."""
    extra_replacement: bool = True
    """Draw each extra image independently of those before it, as the releases do. --no-extra-replacement uses
    every extra image once before any is used again, in another order each time."""
    extra_labels: str | None = None
    """Label the extra images by the predictions of a trained network: its run directory or .safetensors file.
    They are computed once, and kept beside the images. An .npy file of labels is read as it is."""
    extra_checksum: str | None = None
    """Checksum that the extra images and labels must have, as the run's log says it; a run stores that of
    its data."""
