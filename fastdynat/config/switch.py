"""The values of a flag that is automatic, on or off."""

from typing import Literal

Switch = Literal["auto", "on", "off"]
