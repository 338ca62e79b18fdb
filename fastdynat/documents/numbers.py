"""Ranges of numbers and names that several documents share; none contains NaN."""

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=10**15)]
Positive = Annotated[int, Meta(ge=1, le=10**15)]
Whole = Annotated[int, Meta(ge=-(10**15), le=10**15)]
Share = Annotated[float, Meta(ge=0, le=1)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
AboveZero = Annotated[float, Meta(gt=0, le=1e300)]
Radius = Annotated[float, Meta(ge=0, le=1e6)]  # eps in [0, 1] pixel units; under L0 a number of pixels
FileName = Annotated[str, Meta(pattern=r"^[^/\x00]{1,255}$")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
