"""Whether a replay does what the function does: both run from the same state, on the same inputs, with the same random numbers.

Everything that tells a right graph from a wrong one is made to differ between capture and check: the inputs are other images
than those at hand, the weights are moved, the generator stands elsewhere, what the function has to renew is spoilt, and rates
are others while it is captured. Afterwards everything is put back bit for bit.

Copies are kept on the host, so the device needs room for little more than one tensor at a time; the function itself runs before
the capture, when the graph's memory is not taken yet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdynat.graphs.recorder import Recorder

# The largest deviation, as a share of how far the function moves a tensor: of weights, optimiser state, buffers and gradients.
# A graph runs the kernels of the function: with deterministic algorithms their numbers must be equal. Without, atomic additions
# round otherwise (1e-6), and where rounding turns the sign of an image gradient that is noise, whole pixels of an attack move
# by a step. A skipped update, a stale input or a wrong draw is a share of about 1, a rate that is off by a tenth is 0.1.
CHANGES = 0.05
# Of images, relative to what was added to them: 1 % of all pixels on the other side of the image is 0.2.
IMAGES = 0.2
# Where the function itself does not repeat so well, four times what it deviates from itself, but never more than this.
REPEATS, MOST = 4.0, 0.5
# Tensors that hardly move are mostly rounding, such as the gradient of a bias before a batch norm: a deviation of this share of
# what other tensors of the kind move by per element is none.
STILL = 1e-3
NUMBER, COUNT = 0.5, 20  # metrics and counts below these are taken for as large: accuracies near 0, images without gradient


class Subject(Protocol):
    """What a function reads and changes beside its inputs and outputs."""

    def state(self) -> Mapping[str, Tensor]:
        """All tensors that it changes in place, and all that change between its calls, by kind and name ("weight a.b")."""

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


class Pure:
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


@dataclass(frozen=True)
class Difference:
    """How far a replay is from the function: `share` of what `where` changes by, of which `allowed` would be rounding."""

    share: float
    where: str
    allowed: float

    def __str__(self) -> str:
        if self.share == float("inf"):
            return f"{self.where} are others"
        return f"{self.where} differs by {self.share:.2g} of its change ({self.allowed:.2g} would be rounding)"


Results = dict[str, Tensor]


class Check:
    """One comparison of a function with its graph. Use: `reference`, capture within `capturing`, `compare`, `put_back`."""

    def __init__(self, fn: Callable[..., Any], recorder: Recorder, subject: Subject, inputs: tuple[Tensor, ...]) -> None:
        self._fn, self._recorder, self._subject = fn, recorder, subject
        self._device = inputs[0].device
        self._inputs = tuple(_others(t) for t in inputs)
        self._before, self._draws = _on_host(subject.state()), _draws(self._device)
        self._start: Results = {}
        self._want: Results = {}

    def reference(self) -> None:
        """Run the function."""
        self._begin()
        self._start = _on_host(self._subject.state())
        self._want = self._run()
        self.put_back()

    def capturing(self) -> AbstractContextManager[None]:
        return self._subject.disguised()

    def compare(self, inputs: tuple[Tensor, ...], outputs: Any, replay: Callable[[], None]) -> Difference | None:
        """Replay the graph, which reads `inputs` and fills `outputs`, once; the largest difference where it is no rounding."""
        left = self._subject.left()
        self._begin()
        self._subject.spoil()
        for static, value in zip(inputs, self._inputs, strict=True):
            static.copy_(value)
        replay()
        got = self._results(outputs, left)
        exact = torch.are_deterministic_algorithms_enabled()
        worst = self._worst(got, exact=exact, noise={})
        if worst is None or exact:
            return worst
        self._begin()
        noise = {name: share for name, share, _ in self._shares(self._run())}
        return self._worst(got, exact=False, noise=noise)

    @torch.no_grad()
    def put_back(self) -> None:
        """State and random numbers as they were before the check."""
        for name, tensor in self._subject.state().items():
            tensor.copy_(self._before[name])
        _set_draws(self._device, self._draws)
        self._subject.restored()

    def _begin(self) -> None:
        """The state in which both run: other weights than at the capture, and the generator elsewhere."""
        self.put_back()
        for weight in self._subject.weights():
            _move(weight)
        torch.rand(1, device=self._device)

    def _run(self) -> Results:
        outputs = self._recorder.warm(lambda: self._fn(*self._inputs))
        return self._results(outputs, self._subject.left())

    def _results(self, outputs: Any, left: Mapping[str, Tensor]) -> Results:
        """All that can be compared, on the host."""
        found = {f"output {name}".rstrip(): tensor for name, tensor in _tensors(outputs)}
        draws = {"random numbers": torch.cat([t.flatten() for t in _draws(self._device)])}
        return _on_host({**found, **left, **self._subject.state(), **draws})

    def _worst(self, got: Results, *, exact: bool, noise: Mapping[str, float]) -> Difference | None:
        found = []
        if missing := got.keys() ^ self._want.keys():
            return Difference(float("inf"), min(missing), 0.0)
        for name, share, allowed in self._shares(got):
            limit = 0.0 if exact else min(max(allowed, REPEATS * noise.get(name, 0.0)), max(allowed, MOST))
            if not share <= limit:
                found.append(Difference(share, name, limit))
        return max(found, key=lambda d: d.share, default=None)

    def _shares(self, got: Results) -> Iterator[tuple[str, float, float]]:
        """Of each result: its name, by what share it deviates, and what share is allowed."""
        for name, want in self._want.items():
            value, output = got[name], name.startswith("output")
            if want.shape != value.shape or want.dtype != value.dtype:
                yield name, float("inf"), 0.0
            elif _equal(want, value):
                yield name, 0.0, CHANGES
            elif output and want.dim() == 0:
                least = NUMBER if want.is_floating_point() else COUNT
                yield name, _norm(value.double() - want) / max(_norm(want), least), CHANGES
            elif output and not want.is_floating_point():
                yield name, float((want != value).double().mean()), IMAGES
            elif not want.is_floating_point():
                yield name, float("inf"), 0.0
            else:
                yield name, self._share(name, want, value), IMAGES if output and want.dim() == 4 else CHANGES

    def _share(self, name: str, want: Tensor, value: Tensor) -> float:
        least = STILL * self._usual_changes.get(_kind(name), 0.0) * want.numel() ** 0.5
        scale = max(_norm(want - self._base(name, want)), least)
        share = _norm(value - want) / scale if scale > 0 else float("inf")
        return float("inf") if share != share else share  # NaN where one alone is none

    def _base(self, name: str, want: Tensor) -> Tensor:
        """What a result is a change of."""
        if name in self._start:
            return self._start[name]
        attacked = name.startswith("output") and want.dim() == 4
        images = (t.to("cpu", want.dtype) for t in self._inputs if attacked and t.shape == want.shape)
        return next(images, torch.zeros_like(want))

    @cached_property
    def _usual_changes(self) -> dict[str, float]:
        """Of each kind of tensors: the root mean square of what an element changes by."""
        squares: dict[str, tuple[float, int]] = {}
        for name, want in self._want.items():
            if want.is_floating_point() and not name.startswith("output"):
                total, count = squares.get(_kind(name), (0.0, 0))
                change = _norm((want - self._base(name, want)).nan_to_num(0.0, 0.0, 0.0))
                squares[_kind(name)] = (total + change**2, count + want.numel())
        return {kind: (total / max(count, 1)) ** 0.5 for kind, (total, count) in squares.items()}


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nest of mappings, sequences and dataclasses, by their way there."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Any = vars(value).items() if is_dataclass(value) else ()
    items = value.items() if isinstance(value, Mapping) else items
    items = value._asdict().items() if hasattr(value, "_asdict") else items
    items = enumerate(value) if isinstance(value, (list, tuple)) and not items else items
    for key, item in items:
        yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.double()))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _on_host(tensors: Mapping[str, Tensor]) -> Results:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _others(t: Tensor) -> Tensor:
    """Another batch of the same kind, in the same memory format: the rows one further, images mirrored."""
    other = t.roll(1, 0) if t.dim() else t
    return torch.empty_like(t).copy_(other.flip(-1) if t.dim() == 4 else other)


@torch.no_grad()
def _move(weight: Tensor) -> None:
    """By a tenth of each value at most, as differently as no normalisation would take back."""
    wave = torch.arange(weight.numel(), device=weight.device).mul(12.9898).sin().view(weight.shape).to(weight.dtype)
    weight.add_((weight.abs() + 1e-3) * wave, alpha=0.1)


def _draws(device: torch.device) -> list[Tensor]:
    """The random streams that a function on `device` may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_draws(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


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
