"""Networks: ours, torchvision's and timm's, all behind one `build_model` that takes images in [0, 1]."""

from fastdynat.models.build import Normalize, build_model, known_models

__all__ = ["Normalize", "build_model", "known_models"]
