"""Deviation of a compiled or captured function from the function: outputs, weights, buffers, gradients.

Results are tensors on the host by kind and name: "weight model.0.bias", "gradient ...", "output ...".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]
# Tensors that hardly change, such as the gradient of a bias before a batch norm, are mostly rounding: a
# change counts as at least this fraction of the usual change per element of tensors of the kind.
STILL = 1e-3
# Scalars below these are compared as if they were as large: accuracies near 0, counts of images.
NUMBER, COUNT = 0.5, 20


@dataclass(frozen=True)
class Difference:
    """The deviation of a result from its expected value.

    Attributes:
        share: deviation, as a fraction of the result's change.
        where: name of the result.
        allowed: the fraction that rounding explains.
    """

    share: float
    where: str
    allowed: float

    def __str__(self) -> str:
        where = self.where.removeprefix("output ")
        if self.share == float("inf"):
            return f"{where} are others"
        allowed = f"rounding explains at most {self.allowed:.2g}"
        return f"{where} differs by {self.share:.2g} of its change ({allowed})"


class Comparison:
    """Compares results with `want`; changes are relative to the tensor of that name in `base`, or to 0."""

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
        """Yield each result's name and its deviation as a fraction of its change; infinite if it must not
        differ."""
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
    """Yield all tensors in nested mappings, sequences and dataclasses, with their paths as names."""
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
    """The tensors in a function's return value, named "output PATH"."""
    return {f"output {name}".rstrip(): tensor for name, tensor in tensors(value)}


def on_host(results: Mapping[str, Tensor]) -> Results:
    """Copies of `results` on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in results.items()}


def norm(t: Tensor) -> float:
    """The L2 norm, in float64."""
    return float(torch.linalg.vector_norm(t.double()))


def draws(device: torch.device) -> list[Tensor]:
    """The states of torch's generators that a function on `device` may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_draws(device: torch.device, states: list[Tensor]) -> None:
    """Restore generator states that `draws` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _equal(one: Tensor, other: Tensor) -> bool:
    """True if both are equal bit for bit; all NaN count as equal."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
