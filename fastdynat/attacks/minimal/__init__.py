"""Attacks that look for the nearest adversarial image: C&W and DeepFool (L2, DeepFool also L-inf), sigma-zero (L0)."""

from fastdynat.attacks.minimal.carlini import CarliniL2
from fastdynat.attacks.minimal.deepfool import DeepFool
from fastdynat.attacks.minimal.names import parse_minimal
from fastdynat.attacks.minimal.sigma_zero import SigmaZero

__all__ = ["CarliniL2", "DeepFool", "SigmaZero", "parse_minimal"]
