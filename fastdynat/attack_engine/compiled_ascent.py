"""Input gradients of the attacked network by torch.compile."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, GoalGradient, LogitGrad, T, goal_gradient
from fastdynat.attack_engine.goal import AttackGoal, GoalKind
from fastdynat.execution.compile_check import CompileCheck
from fastdynat.execution.compiling import compile_whole
from fastdynat.execution.fallbacks import Fallbacks, WarnedFallbacks

# Functions compiled per network; further ones, such as a new kappa at every call, run eagerly.
MAX_KINDS = 16
FEW_IMAGES = 8  # of a batch, for the comparison with the eager attack; in eval mode images do not mix


@dataclass(frozen=True)
class FunctionalAscent(Ascent):
    """`Ascent` whose gradients come from `torch.func`, which Dynamo traces into one graph."""

    def value_and_grad(self, model_input: Tensor, logit_grad: LogitGrad[T]) -> tuple[T, Tensor]:
        # Dynamo drops the gradient of an autograd.Function that reads the differentiated tensor itself, but
        # not of one that reads a view of it.
        found: Any = torch.func.vjp(lambda leaf: self.logits(leaf.view_as(leaf)), model_input)
        logits, vjp = found
        grad, value = logit_grad(logits)
        return value, vjp(grad)[0]

    def _logits_and_autograd(self, model_input: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        def loss(leaf: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(leaf.view_as(leaf))
            return goal.per_image(logits).sum() * self.underflow.loss_scale, logits

        grad, logits = torch.func.grad(loss, has_aux=True)(model_input)
        return logits, grad


@dataclass(frozen=True)
class CompiledAscent(Ascent):
    """`Ascent` whose gradient is one compiled graph: forward and input gradient, without weight gradients.

    The projected step after it is one fused operator that no compiler improves. Radius and step size are
    therefore no part of any graph, and new ones compile nothing. The network must not write to buffers, so
    its batch norm must be in eval mode.

    Attributes:
        mode: a key of `fastdynat.execution.compiling.MODES`, or "auto".
        fallbacks: collects the functions that are not compiled, with the reasons.
    """

    mode: str = "default"
    fallbacks: Fallbacks = field(default_factory=WarnedFallbacks)
    _graphs: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    @property
    def max_halvings(self) -> int:
        return 3

    def eager(self) -> Ascent:
        """The same ascent without compilation."""
        return Ascent(
            self.network,
            self.underflow,
            self.dtype,
            self.closed_form,
            allow_no_gradient=self.allow_no_gradient,
        )

    def goal_gradient(self, kind: GoalKind) -> Callable[[Tensor, Tensor], GoalGradient]:
        return self._graph(
            partial(goal_gradient, kind=kind), kind, "the attack", GoalGradient._fields, FEW_IMAGES
        )

    def compiled(
        self, fn: Callable[..., Any], *, key: Hashable, names: Sequence[str] = ()
    ) -> Callable[..., Any]:
        return self._graph(fn, key, "the search", names)

    def _graph(
        self, fn: Callable[..., Any], key: Hashable, what: str, names: Sequence[str], rows: int | None = None
    ) -> Callable[..., Any]:
        """The compiled `fn` of `key`; `fn` as it is where `MAX_KINDS` others are compiled."""
        if key in self._graphs:
            return self._graphs[key]
        if len(self._graphs) >= MAX_KINDS:
            self.fallbacks.add(
                f"{MAX_KINDS} kinds of attack are compiled; further ones run without torch.compile"
            )
            return partial(fn, self)
        # Neither form may hold this object, which keeps the graph: the cycle would keep all weights alive.
        eager = self.eager()
        functional = FunctionalAscent(**vars(eager))
        network = self.network if isinstance(self.network, nn.Module) else None
        self._graphs[key] = compile_whole(
            partial(fn, functional),
            mode=self.mode,
            what=what,
            fallbacks=self.fallbacks,
            otherwise=partial(fn, eager),
            check=CompileCheck(network, rows, names),
        )
        return self._graphs[key]
