"""One operator in the dispatcher: a schema, a fake, an autograd formula, and the table of its
implementations.

Two names are registered. ``fastdynat::NAME`` is csrc/'s: its CPU and CUDA kernels go first, and without them
the eager form serves every device. ``fastdynat::NAME_triton`` is the launcher in kernels/. Registration is
for compilers and autograd; which implementation runs is chosen in `_select`.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fastdynat.ops._select import OPERATORS

Implementations = dict[str, Callable[..., Any]]
TAGS = (torch.Tag.pt2_compliant_tag,)


def register(
    name: str,
    signature: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    module: str | None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    reference: Callable[..., Any] | None = None,
) -> Implementations:
    """Register operator `name` and return its implementations by backend, all called with the schema's
    arguments.

    Args:
        name: of the operator, of the C++ registration and of the launcher function in `module`.
        signature: the schema after the name, "(Tensor x, ...) -> Tensor".
        eager: plain torch with the schema's inputs and outputs; serves devices without a kernel.
        fake: the same signature, returning empty tensors of the right shape, dtype and strides.
        module: name of the file in kernels/ with the Triton launcher; None for an operator of the CPU, which
            has neither Triton nor CUDA kernels.
        backward, setup_context: as `torch.library.register_autograd` takes them; None: no gradient flows.
        reference: what backend "eager" runs where it must be differentiable by autograd itself; default
            `eager`.
    """

    def triton(*args: Any) -> Any:
        # Imported here because triton may be missing.
        return getattr(importlib.import_module(f"fastdynat.kernels.{module}"), name)(*args)

    for full_name, default in ((name, eager), *([(f"{name}_triton", triton)] if module else [])):
        qualified = f"fastdynat::{full_name}"
        torch.library.define(qualified, signature, tags=TAGS)
        torch.library.impl(qualified, "default", default)
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    OPERATORS.append(name)

    # Looked up at each call: an overload object taken here would hide a library loaded later.
    def native(*args: Any) -> Any:
        return getattr(torch.ops.fastdynat, name)(*args)

    def registered_triton(*args: Any) -> Any:
        return getattr(torch.ops.fastdynat, f"{name}_triton")(*args)

    # Only a compiler has to see one registered operator. Elsewhere a launcher is called as it is, and a
    # formula goes into a plain autograd.Function: 30 microseconds less per forward and backward pass than by
    # way of the dispatcher.
    eager_native, eager_triton = native, triton
    if backward is not None and setup_context is not None:
        eager_native = _differentiable(native, backward, setup_context)
        eager_triton = _differentiable(triton, backward, setup_context)

    def call_native(*args: Any) -> Any:
        return native(*args) if torch.compiler.is_compiling() else eager_native(*args)

    def call_triton(*args: Any) -> Any:
        return registered_triton(*args) if torch.compiler.is_compiling() else eager_triton(*args)

    found = {"cpp": call_native, "eager": reference or eager}
    return found | {"triton": call_triton, "cuda": call_native} if module else found


def _differentiable(
    run: Callable[..., Any], formula: Callable[..., Any], save: Callable[..., None]
) -> Callable[..., Any]:
    """`run` with the formula that the dispatcher has, for eager mode."""

    class Differentiable(torch.autograd.Function):
        # One function with the context: beside a setup_context, torch inspects the signature at every call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = run(*args)
            save(ctx, args, outputs)
            return outputs

        backward = staticmethod(formula)

    def call(*args: Any) -> Any:
        return Differentiable.apply(*args) if torch.is_grad_enabled() else run(*args)

    return call
