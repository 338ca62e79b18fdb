"""Comparison of a graph's replay with its function, from the same state, inputs and random numbers.

Everything that a wrong graph might keep from its capture is changed before the check: the inputs are other
images, the weights are moved, the generator is advanced, values that the function must recompute are
overwritten, and rates are scaled and the epoch is another one during the capture. Afterwards everything is
restored bit for bit.

Copies are kept on the host, so that the device needs little more memory than one tensor; the function runs
before the capture, while the graph's memory is not taken yet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdynat.execution.deviation import Comparison, Difference, Results, draws, on_host, outputs, set_draws
from fastdynat.execution.graph_capture import Recorder

# The largest deviation, as a share of how far the function moves a tensor: of weights, optimiser state,
# buffers and gradients. A graph runs the kernels of the function: with deterministic algorithms their numbers
# must be equal. Without, atomic additions round otherwise (1e-6), and where rounding turns the sign of an
# image gradient that is noise, whole pixels of an attack move by a step. A skipped update, a stale input or a
# wrong draw is a share of about 1, a rate that is off by a tenth is 0.1.
CHANGES = 0.05
# Of images, relative to what was added to them: 1 % of all pixels on the other side of the image is 0.2.
IMAGES = 0.2
# Where the function itself does not repeat so well, four times what it deviates from itself, but never more
# than this.
REPEATS, MOST = 4.0, 0.5


class FunctionState(Protocol):
    """The state that a function reads and changes besides its inputs and outputs."""

    def state(self) -> Mapping[str, Tensor]:
        """All tensors changed in place by the function or between its calls, by kind and name ("weight
        a.b")."""

    def weights(self) -> Sequence[Tensor]:
        """The tensors of `state` whose values the check may perturb."""

    def left(self) -> Mapping[str, Tensor]:
        """Tensors left elsewhere by the last run or capture: gradients."""

    def spoil(self) -> None:
        """Overwrite values that the function must recompute from `state` before it reads them."""

    def restored(self) -> None:
        """Called after `state` is restored, to update values derived from it."""

    def disguised(self) -> AbstractContextManager[None]:
        """A context that changes numbers which the function must read anew at each run."""


class Stateless:
    """The state of a function that changes nothing."""

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def weights(self) -> Sequence[Tensor]:
        return ()

    def left(self) -> Mapping[str, Tensor]:
        return {}

    def spoil(self) -> None: ...

    def restored(self) -> None: ...

    def disguised(self) -> AbstractContextManager[None]:
        return nullcontext()


class GraphCheck:
    """One comparison of a function with its graph. Use: `reference`, capture within `capturing`, `compare`,
    `put_back`.
    """

    def __init__(
        self, fn: Callable[..., Any], recorder: Recorder, subject: FunctionState, inputs: tuple[Tensor, ...]
    ) -> None:
        self._fn, self._recorder, self._subject = fn, recorder, subject
        self._device = inputs[0].device
        self._inputs = tuple(_others(t) for t in inputs)
        self._before, self._draws = on_host(subject.state()), draws(self._device)
        self._start: Results = {}
        self._want: Results = {}

    def reference(self) -> None:
        """Run the function."""
        self._begin()
        self._start = on_host(self._subject.state())
        self._want = self._run()
        self.put_back()

    def capturing(self) -> AbstractContextManager[None]:
        return self._subject.disguised()

    def compare(
        self,
        inputs: tuple[Tensor, ...],
        returned: Any,
        replay: Callable[[], None],
        well: Callable[[bool], bool] = bool,
    ) -> Difference | None:
        """Replay the graph, which reads `inputs` and fills `returned`; the largest difference beyond
        rounding.

        well: told whether the replay agrees; False where it does not in another process that takes part in
            the function's collectives. The function then runs once more in all of them.
        """
        left = self._subject.left()
        self._begin()
        self._subject.spoil()
        for static, value in zip(inputs, self._inputs, strict=True):
            static.copy_(value)
        replay()
        compared, got = self._compared(), self._results(returned, left)
        exact = torch.are_deterministic_algorithms_enabled()
        found = [
            Difference(share, name, 0.0 if exact else self._allowed(name))
            for name, share in compared.shares(got)
        ]
        found = [d for d in found if d.share > d.allowed]
        if not exact and not well(not found):
            self._begin()
            noise = dict(compared.shares(self._run()))
            found = [
                replace(d, allowed=max(d.allowed, min(REPEATS * noise.get(d.where, 0.0), MOST)))
                for d in found
            ]
        return max((d for d in found if d.share > d.allowed), key=lambda d: d.share, default=None)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore state and random streams."""
        for name, tensor in self._subject.state().items():
            tensor.copy_(self._before[name])
        set_draws(self._device, self._draws)
        self._subject.restored()

    def _begin(self) -> None:
        """Set the state in which both run: weights and generator differ from those at the capture."""
        self.put_back()
        for weight in self._subject.weights():
            _move(weight)
        torch.rand(1, device=self._device)

    def _run(self) -> Results:
        returned = self._recorder.warm(lambda: self._fn(*self._inputs))
        return self._results(returned, self._subject.left())

    def _results(self, returned: Any, left: Mapping[str, Tensor]) -> Results:
        """All results to compare, on the host."""
        drawn = torch.cat([state.flatten() for state in draws(self._device)])
        return on_host({**outputs(returned), **left, **self._subject.state(), "random numbers": drawn})

    def _compared(self) -> Comparison:
        """The function's results with their baselines: the state before, the images before."""
        images = [t for t in self._inputs if t.dim() == 4]
        attacked = {
            name: x.to("cpu", want.dtype)
            for name, want in self._want.items()
            for x in images
            if name.startswith("output") and want.shape == x.shape
        }
        return Comparison(self._want, {**self._start, **attacked})

    def _allowed(self, name: str) -> float:
        want = self._want.get(name)
        return IMAGES if name.startswith("output") and want is not None and want.dim() > 0 else CHANGES


def _others(t: Tensor) -> Tensor:
    """Another batch in the same memory format: rows rolled by one, images mirrored."""
    other = t.roll(1, 0) if t.dim() else t
    return torch.empty_like(t).copy_(other.flip(-1) if t.dim() == 4 else other)


@torch.no_grad()
def _move(weight: Tensor) -> None:
    """Move each value by up to a tenth, unevenly, so that no normalisation undoes it."""
    wave = (
        torch.arange(weight.numel(), device=weight.device)
        .mul(12.9898)
        .sin()
        .view(weight.shape)
        .to(weight.dtype)
    )
    weight.add_((weight.abs() + 1e-3) * wave, alpha=0.1)


@contextmanager
def scaled(numbers: Sequence[Tensor], factor: float, *, plus: float = 0.0) -> Iterator[None]:
    """A context in which `numbers` are multiplied by `factor`, and `plus` is added where it is not 0."""
    before = [number.clone() for number in numbers]
    for number in numbers:
        number.mul_(factor)
        if plus:
            number.add_(plus)
    try:
        yield
    finally:
        for number, value in zip(numbers, before, strict=True):
            number.copy_(value)
