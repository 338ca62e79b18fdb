"""Deviation of a fast form of a function (compiled, captured) from the function: outputs, weights, buffers,
gradients.

Results are tensors on the host by kind and name: "weight model.0.bias", "gradient ...", "output ...".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]
# Tensors that hardly change are mostly rounding, such as the gradient of a bias before a batch norm: a
# deviation of this share of what other tensors of the kind change by per element is none.
STILL = 1e-3
NUMBER, COUNT = (
    0.5,
    20,
)  # numbers and counts below these are taken for as large: accuracies near 0, images without gradient


@dataclass(frozen=True)
class Difference:
    """How far a result is from what it should be: `share` of what `where` changes by, of which `allowed`
    would be rounding.
    """

    share: float
    where: str
    allowed: float

    def __str__(self) -> str:
        where = self.where.removeprefix("output ")
        if self.share == float("inf"):
            return f"{where} are others"
        return f"{where} differs by {self.share:.2g} of its change (rounding explains at most {self.allowed:.2g})"


class Comparison:
    """Compares results with `want`, which are changes of `base`, or of 0 where that has none of the name."""

    def __init__(self, want: Results, base: Mapping[str, Tensor]) -> None:
        self.want, self._base = want, base
        squares: dict[str, tuple[float, int]] = {}
        for name, value in want.items():
            if value.is_floating_point() and not name.startswith("output"):
                total, count = squares.get(_kind(name), (0.0, 0))
                change = norm(self._change(name, value).nan_to_num(0.0, 0.0, 0.0))
                squares[_kind(name)] = (total + change**2, count + value.numel())
        self._usual = {kind: (total / max(count, 1)) ** 0.5 for kind, (total, count) in squares.items()}

    def shares(self, got: Results) -> Iterator[tuple[str, float]]:
        """Of each result its name and by what share of its change it deviates; infinite where it has no
        business to.
        """
        for name in sorted(got.keys() ^ self.want.keys()):
            yield name, float("inf")
        for name in sorted(got.keys() & self.want.keys()):
            share = self._share(name, self.want[name], got[name])
            yield name, float("inf") if share != share else share  # NaN where one alone is none

    def _share(self, name: str, want: Tensor, value: Tensor) -> float:
        output, real = name.startswith("output"), want.is_floating_point()
        if want.shape != value.shape or want.dtype != value.dtype:
            return float("inf")
        if _equal(want, value):
            return 0.0
        if output and want.dim() == 0:
            return norm(value.double() - want) / max(norm(want), NUMBER if real else COUNT)
        if not real:
            return float((want != value).double().mean()) if output else float("inf")
        least = STILL * self._usual.get(_kind(name), 0.0) * want.numel() ** 0.5
        scale = max(norm(self._change(name, want)), least)
        return norm(value.double() - want) / scale if scale > 0 else float("inf")

    def _change(self, name: str, value: Tensor) -> Tensor:
        return value - self._base[name] if name in self._base else value


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nest of mappings, sequences and dataclasses, by their way there."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif hasattr(value, "_asdict"):
        items = value._asdict().items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif is_dataclass(value):
        items = vars(value).items()
    for key, item in items:
        yield from tensors(item, f"{name}.{key}" if name else str(key))


def outputs(value: Any) -> dict[str, Tensor]:
    """The tensors of what a function has returned, named as results are."""
    return {f"output {name}".rstrip(): tensor for name, tensor in tensors(value)}


def on_host(results: Mapping[str, Tensor]) -> Results:
    """Copies."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in results.items()}


def norm(t: Tensor) -> float:
    """The L2 norm, in float64."""
    return float(torch.linalg.vector_norm(t.double()))


def draws(device: torch.device) -> list[Tensor]:
    """The states of torch's random streams that a function on `device` may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_draws(device: torch.device, states: list[Tensor]) -> None:
    """Put back what `draws` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
