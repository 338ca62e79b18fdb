"""Warning about images without a gradient, given without making the host wait for a GPU."""

from collections.abc import Callable

from fastdynat.attack_engine.input_checks import DeferredCheck
from fastdynat.attack_engine.zero_gradients import zero_gradient_message
from fastdynat.attacks import AttackResult


class GradientWatch:
    """Warns, once, of gradients that were zero or not finite in every pixel (`AttackResult.zero_grads`)."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._told, self._later = warn, False, DeferredCheck(self._judge)

    def __call__(self, result: AttackResult, remedy: str) -> None:
        """remedy: the advice at the end (`remedy_for`)."""
        if not self._told and result.gradients:
            self._later(result.zero_grads[None], result.gradients, remedy)

    def _judge(self, numbers: list[int], gradients: int, remedy: str, which: str) -> None:
        if numbers[0] and not self._told:
            self._told = True
            self._warn(zero_gradient_message(numbers[0], gradients, remedy, which))
