"""Flags of the images."""

from dataclasses import dataclass
from typing import Literal

Loader = Literal["auto", "dali", "resident", "torch"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images."""

    data: str = "digits"
    """Dataset: digits (embedded), cifar10, cifar100, svhn, mnist, imagefolder,
    hf:NAME_OR_FOLDER (parquet files, the Hugging Face hub), or path/to/file.py:callable, which returns
    tensors or a torch Dataset."""
    data_dir: str = "data"
    """Folder of the dataset, where it is also downloaded to; for imagefolder, the folder that holds train/
    and test/."""
    download: bool = True
    """Fetch a torchvision dataset that is not in --data-dir, or a dataset of the Hugging Face hub."""
    image_size: int | None = None
    """Resize and centre-crop an image folder's images to this size; None keeps theirs."""
    train_size: int | None = None
    """Train on a class-stratified subset of this many images; None is all."""
    labelled: int | None = None
    """Semi-supervised training (vat): keep the labels of only this many training images, class-stratified;
    None is all."""
    val_size: float | None = None
    """Images held out of training for model selection: a number, or a share below 1; None is 1000, or 10 % of
    small data."""
    augment: Literal["auto", "none", "flip", "crop", "crop-flip"] = "auto"
    """Augmentation; auto is the dataset's usual one (crop-flip for CIFAR)."""
    pad_mode: Literal["zeros", "reflect"] = "zeros"
    """Padding of the random crops: zeros, or the image mirrored at its border (Rice et al., AWP, Bag of
    Tricks)."""
    epoch_steps: int | None = None
    """Updates in an epoch; None is one pass over the images. A larger number continues with the images in
    another order; a smaller one ends the epoch early."""
    batch_size: int | None = None
    """Images per step; None is 128, or 64 for digits."""
    drop_last: bool = False
    """Skip the last, incomplete batch of each epoch (different images in each epoch). Otherwise it is trained
    on, but without torch.compile and CUDA graphs, which are specific to a batch size."""
    eval_batch_size: int = 500
    """Images per evaluation batch."""
    loader: Loader = "auto"
    """Loader of training batches: resident (images in device memory), dali (extra `dali`) or torch (worker
    processes). auto is resident if the images take at most a quarter of the memory, else dali if it is
    installed, else torch."""
    workers: int | None = None
    """Worker processes of the torch loader, or threads of dali; None is the number of cores minus one, at
    most 8."""
