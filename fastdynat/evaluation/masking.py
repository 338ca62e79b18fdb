"""Signs that a robust accuracy is not one: gradients that are masked, not absent (Athalye et al. 2018, Carlini et al. 2019)."""

from dataclasses import dataclass

from fastdynat.evaluation.outcome import Measurement


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sign of masking that was looked for.

    Attributes:
        name: of the check.
        passed: the sign is not there.
        evidence: the numbers, in words.
        remedy: what to run next, as a command where there is one; "" if passed.
    """

    name: str
    passed: bool
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class MaskingReport:
    """All checks, and the measurements that they rest on."""

    checks: list[Check]
    measurements: list[Measurement]

    @property
    def warnings(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]
