"""Warnings that name the line of the user's code, however deep in the package they arise."""

import contextlib
import sys
import warnings
from pathlib import Path

PACKAGE = f"{Path(__file__).parent}/"


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning for the innermost line outside of this package.

    Context managers and torch's decorators (``torch.no_grad()``) between its frames are passed over.
    """
    # skip_file_prefixes of warnings.warn needs Python 3.12.
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    inner = (PACKAGE, contextlib.__file__, *(() if torch is None else (f"{Path(torch).parent}/",)))
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
