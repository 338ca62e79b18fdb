"""Comparison of a replay with its function: both run from the same state, on the same inputs, with the same
random numbers.

Everything that tells a right graph from a wrong one is made to differ between capture and check: the inputs
are other images than those at hand, the weights are moved, the generator stands elsewhere, what the function
has to renew is spoilt, and rates are others while it is captured. Afterwards everything is put back bit for
bit.

Copies are kept on the host, so the device needs room for little more than one tensor at a time; the function
itself runs before the capture, when the graph's memory is not taken yet.
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
    """What a function reads and changes beside its inputs and outputs."""

    def state(self) -> Mapping[str, Tensor]:
        """All tensors that it changes in place, and all that change between its calls, by kind and name
        ("weight a.b").
        """

    def weights(self) -> Sequence[Tensor]:
        """Those of `state` whose values may be moved a little for the check."""

    def left(self) -> Mapping[str, Tensor]:
        """What its last run, or its capture, has left elsewhere: gradients."""

    def spoil(self) -> None:
        """Overwrite what it renews from `state` before it reads it."""

    def restored(self) -> None:
        """Called when `state` is put back after the check, for what is derived from it."""

    def disguised(self) -> AbstractContextManager[None]:
        """Within it numbers that it must read anew at each run are others."""


class Stateless:
    """A function that changes nothing."""

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
        self, inputs: tuple[Tensor, ...], returned: Any, replay: Callable[[], None]
    ) -> Difference | None:
        """Replay the graph, which reads `inputs` and fills `returned`, once; the largest difference where it
        is no rounding.
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
        if found and not exact:
            self._begin()
            noise = dict(compared.shares(self._run()))
            found = [
                replace(d, allowed=max(d.allowed, min(REPEATS * noise.get(d.where, 0.0), MOST)))
                for d in found
            ]
        return max((d for d in found if d.share > d.allowed), key=lambda d: d.share, default=None)

    @torch.no_grad()
    def put_back(self) -> None:
        """State and random numbers as they were before the check."""
        for name, tensor in self._subject.state().items():
            tensor.copy_(self._before[name])
        set_draws(self._device, self._draws)
        self._subject.restored()

    def _begin(self) -> None:
        """The state in which both run: other weights than at the capture, and the generator elsewhere."""
        self.put_back()
        for weight in self._subject.weights():
            _move(weight)
        torch.rand(1, device=self._device)

    def _run(self) -> Results:
        returned = self._recorder.warm(lambda: self._fn(*self._inputs))
        return self._results(returned, self._subject.left())

    def _results(self, returned: Any, left: Mapping[str, Tensor]) -> Results:
        """All that can be compared, on the host."""
        drawn = torch.cat([state.flatten() for state in draws(self._device)])
        return on_host({**outputs(returned), **left, **self._subject.state(), "random numbers": drawn})

    def _compared(self) -> Comparison:
        """With what the function did: to its state, to its images."""
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
    """Another batch of the same kind, in the same memory format: the rows one further, images mirrored."""
    other = t.roll(1, 0) if t.dim() else t
    return torch.empty_like(t).copy_(other.flip(-1) if t.dim() == 4 else other)


@torch.no_grad()
def _move(weight: Tensor) -> None:
    """By a tenth of each value at most, as differently as no normalisation would take back."""
    wave = (
        torch.arange(weight.numel(), device=weight.device)
        .mul(12.9898)
        .sin()
        .view(weight.shape)
        .to(weight.dtype)
    )
    weight.add_((weight.abs() + 1e-3) * wave, alpha=0.1)


@contextmanager
def scaled(numbers: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Within it `numbers` are `factor` times what they are."""
    before = [number.clone() for number in numbers]
    for number in numbers:
        number.mul_(factor)
    try:
        yield
    finally:
        for number, value in zip(numbers, before, strict=True):
            number.copy_(value)
