"""Registration of an operator: dispatcher schema, fake, autograd formula and table of implementations.

Two names are registered. ``fastdynat::NAME`` is implemented by csrc/ on the CPU and on CUDA; without
csrc/ the eager form serves every device. ``fastdynat::NAME_triton`` is the launcher in kernels/. Registration
is for compilers and autograd; `_select` chooses the implementation that runs.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdynat.ops._select import OPERATORS

Implementations = dict[str, Callable[..., Any]]
TAGS = (torch.Tag.pt2_compliant_tag,)


def register_operator(
    name: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    gpu: bool = True,
    mutates: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    reference: Callable[..., Any] | None = None,
) -> Implementations:
    """Register operator `name` and return its implementations by backend, all called by position.

    Args:
        name: of the operator, its file in kernels/, the launcher in that file and the C++ registration.
        eager: the operator in plain torch, for any device. The schema is inferred from its signature.
        fake: called with all arguments by name; returns empty tensors with the outputs' shapes, dtypes and
            strides.
        gpu: there are Triton and CUDA kernels; False for an operator of the CPU.
        mutates: names of the arguments that the operator writes to.
        backward, setup_context: as `torch.library.register_autograd` takes them; None: not differentiable.
        reference: backend "eager", where autograd must differentiate it; default `eager`.
    """
    schema = torch.library.infer_schema(eager, mutates_args=tuple(mutates))
    signature = inspect.signature(eager)

    def call_fake(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # the dispatcher leaves out trailing arguments that equal their defaults
        return fake(**bound.arguments)

    def triton(*args: Any) -> Any:
        # Imported at the first call because triton may not be installed.
        return getattr(importlib.import_module(f"fastdynat.kernels.{name}"), name)(*args)

    for full_name, default in ((name, eager), *([(f"{name}_triton", triton)] if gpu else [])):
        qualified = f"fastdynat::{full_name}"
        torch.library.define(qualified, schema, tags=TAGS)
        torch.library.impl(qualified, "default", default)
        torch.library.register_fake(qualified, call_fake)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    OPERATORS.append(name)

    # Looked up at each call: an overload object taken here would hide a library loaded later.
    def native(*args: Any) -> Any:
        return getattr(torch.ops.fastdynat, name)(*args)

    def registered_triton(*args: Any) -> Any:
        return getattr(torch.ops.fastdynat, f"{name}_triton")(*args)

    # Only a compiler needs the registered operator. Eager calls skip the dispatcher: the launcher is called
    # directly, the formula is a plain autograd.Function. That saves 30 us per forward and backward pass.
    eager_native, eager_triton = native, triton
    if backward is not None and setup_context is not None:
        eager_native = _differentiable(native, backward, setup_context)
        eager_triton = _differentiable(triton, backward, setup_context)

    def call_native(*args: Any) -> Any:
        return native(*args) if torch.compiler.is_compiling() else eager_native(*args)

    def call_triton(*args: Any) -> Any:
        return registered_triton(*args) if torch.compiler.is_compiling() else eager_triton(*args)

    found = {"cpp": call_native, "eager": reference or eager}
    return found | {"triton": call_triton, "cuda": call_native} if gpu else found


def _differentiable(
    run: Callable[..., Any], formula: Callable[..., Any], save: Callable[..., None]
) -> Callable[..., Any]:
    """Return `run` with backward formula `formula`, for eager mode."""

    class Differentiable(torch.autograd.Function):
        # Not split into forward and setup_context: torch would inspect the signature at every call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = run(*args)
            save(ctx, args, outputs)
            return outputs

        backward = staticmethod(formula)

    def call(*args: Any) -> Any:
        return Differentiable.apply(*args) if torch.is_grad_enabled() else run(*args)

    return call
