"""Comparison of compiled code with its function, on the arguments of the first call with each signature.

It is repeated once after the weights have changed, to find code that keeps the weights of its compilation.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.execution.deviation import Comparison, Difference, Results, draws, on_host, outputs, set_draws
from fastdynat.execution.float32 import tf32_convolutions
from fastdynat.execution.synchronization import waits_on_purpose

# The largest deviation of a result, as a share of its L2 norm, by the lowest precision that it is computed
# in. Compiled code adds in another order and rounds to half precision less often, and a rectifier may switch
# for one unit. A wrong gradient or a lost normalisation is a share of 0.3 and more.
ALLOWED = {torch.float64: 1e-6, torch.float32: 2e-2, torch.float16: 0.1, torch.bfloat16: 0.3}
TF32 = 0.1  # rounds factors as float16 does
# A result of dropout may differ four times as much as two eager runs differ from each other, and a result
# that is mostly rounding, as the gradient of a bias before batch norm, four times as much as eager differs
# from float32.
REPEATS = 4.0


class CompileCheck:
    """Compares compiled code with its function.

    Attributes:
        module: the module whose parameters and buffers the function reads; gradients of parameters, and
            buffers, are compared, too.
        rows: number of images that the uncompiled run gets, if images do not mix; None is all.
        names: names of a returned tuple's entries; "" for one that is not compared.
    """

    def __init__(self, module: nn.Module | None, rows: int | None = None, names: Sequence[str] = ()) -> None:
        self._parameters = {} if module is None else dict(module.named_parameters())
        self._buffers = {} if module is None else dict(module.named_buffers())
        self._rows, self._names = rows, names
        self._seen: dict[
            Any, int | None
        ] = {}  # version of the weights at a signature's first check; None after its second

    def due(self, signature: Any) -> bool:
        """True if this call is to be checked; never during a CUDA graph's capture, where nothing may wait."""
        if signature in self._seen:
            first = self._seen[signature]
            if first is None or first == self._version():
                return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    @waits_on_purpose()
    def __call__(
        self, signature: Any, compiled: Callable[..., Any], plain: Callable[..., Any], args: tuple[Any, ...]
    ) -> Difference | None:
        """The largest difference beyond rounding; buffers and random streams are restored.

        Raises:
            what `compiled` and `plain` raise.
        """
        self._seen[signature] = None if signature in self._seen else self._version()
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        before, drawn = {name: buffer.clone() for name, buffer in self._buffers.items()}, draws(device)
        few = (
            tuple(a[: self._rows] if isinstance(a, Tensor) and a.dim() else a for a in args)
            if self._rows
            else args
        )

        def run(fn: Callable[..., Any], given: tuple[Any, ...]) -> Results:
            try:
                return self._results(fn, given)
            finally:
                for name, buffer in self._buffers.items():
                    buffer.data.copy_(
                        before[name]
                    )  # `data`: a graph of the caller's may have saved this buffer's version
                set_draws(device, drawn)

        compared = Comparison(
            run(plain, few), {f"buffer {name}": value.cpu() for name, value in before.items()}
        )
        limit = self._limit(args, compared.want, device)
        shares = dict(compared.shares(run(compiled, args)))
        found = [Difference(share, name, limit) for name, share in shares.items() if not share <= limit]
        if found:
            torch.rand(1, device=device)
            noise = dict(compared.shares(run(plain, few)))
            if torch.is_autocast_enabled(device.type):
                with torch.autocast(device.type, enabled=False), suppress(RuntimeError):  # half weights
                    exact = run(plain, few)
                    exact = {name: value.to(compared.want[name].dtype) for name, value in exact.items()}
                    rounding = dict(compared.shares(exact))
                    noise = {name: max(share, rounding.get(name, 0.0)) for name, share in noise.items()}
            found = [replace(d, allowed=max(limit, REPEATS * noise.get(d.where, 0.0))) for d in found]
        return max((d for d in found if d.share > d.allowed), key=lambda d: d.share, default=None)

    def _results(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Results:
        returned = fn(*args)
        named = returned
        if self._names:
            named = {name: value for name, value in zip(self._names, returned, strict=True) if name}
        found = outputs(named)
        ends = [value for value in found.values() if value.requires_grad]
        leaves: dict[str, Any] = {**self._parameters, **{f"argument {i}": a for i, a in enumerate(args)}}
        needed = {
            name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad
        }
        if ends and needed:
            upstream = [
                torch.linspace(-1, 1, e.numel(), dtype=e.dtype, device=e.device).view(e.shape) for e in ends
            ]
            gradients = torch.autograd.grad(ends, [*needed.values()], upstream, allow_unused=True)
            found |= {
                f"gradient {name}": g for name, g in zip(needed, gradients, strict=True) if g is not None
            }
        if self._rows:
            found = {name: value[: self._rows] if value.dim() else value for name, value in found.items()}
        return on_host({**found, **{f"buffer {name}": buffer for name, buffer in self._buffers.items()}})

    def _version(self) -> int:
        return sum(0 if p.is_inference() else p._version for p in self._parameters.values())

    def _limit(self, args: tuple[Any, ...], want: Results, device: torch.device) -> float:
        dtypes = {
            value.dtype for value in (*args, *want.values()) if isinstance(value, Tensor)
        } & ALLOWED.keys()
        if torch.is_autocast_enabled(device.type):
            dtypes |= {torch.get_autocast_dtype(device.type)} & ALLOWED.keys()
        dtypes = dtypes or {torch.float32}
        if dtypes == {torch.float64}:
            return ALLOWED[torch.float64]
        limit = max(ALLOWED[dtype] for dtype in dtypes)
        return max(limit, TF32) if tf32_convolutions(device) else limit
