"""Fast dynamic-label adversarial training."""

__version__ = "0.1.0"
