"""Fast dynamic-label adversarial training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdynat.compat.torchattacks import BIM, FFGSM, FGSM, PGD, PGDL2, TPGD

__all__ = ["BIM", "FFGSM", "FGSM", "PGD", "PGDL2", "TPGD", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The attacks, imported where they are used: the command line and `import fastdynat` do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import fastdynat.compat.torchattacks as attacks

    return getattr(attacks, name)
