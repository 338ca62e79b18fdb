"""Networks: ours, torchvision's and timm's, all behind one `build_model` that takes images in [0, 1]."""

from fastdynat.models.build import Divide, Normalize, build_model, known_models, undivided
from fastdynat.models.convolution_shapes import convolutions
from fastdynat.models.foreign import ForeignModel, load_foreign
from fastdynat.models.layer_styles import split_style

__all__ = [
    "Divide",
    "ForeignModel",
    "Normalize",
    "build_model",
    "convolutions",
    "known_models",
    "load_foreign",
    "split_style",
    "undivided",
]
