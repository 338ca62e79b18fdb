"""Gradients of the attacked network as compiled graphs."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Look, Pull, T
from fastdynat.attack_engine.goal import AttackGoal, Kind
from fastdynat.execution.compile_check import CompileCheck
from fastdynat.execution.compiling import compile_whole

# Goals and searches that are compiled per network; further ones, such as a new kappa for every call, run
# uncompiled.
MAX_KINDS = 16
FEW_IMAGES = 8  # that are attacked uncompiled too, for comparison; in eval mode they do not mix


@dataclass(frozen=True)
class CompiledAscent(Ascent):
    """`Ascent` whose look at an iterate is one compiled graph: forward, input gradient, and no weight
    gradient.

    The step that follows is one fused operator, which no compiler improves. Its radius and step size are
    therefore no part of any graph: new ones compile nothing. The network must not write to buffers: batch
    norm in eval mode.
    """

    mode: str = "default"
    say: Callable[[str], None] = warnings.warn
    _graphs: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _said: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> int:
        return 3

    def eager(self) -> Ascent:
        """The same without compilation."""
        return Ascent(self.network, self.underflow, self.dtype, self.closed_form, blind=self.blind)

    def look(self, kind: Kind) -> Look:
        def make() -> Callable[..., Any]:
            bare = replace(
                self, _graphs={}
            )  # what is kept must not hold who keeps it: a cycle with all weights in it
            plain, whole = Ascent.look(bare, kind), bare._look(kind, bare._functional_linearize)
            check = CompileCheck(self._module, FEW_IMAGES, ("gradient", "satisfied", "kept"))
            return compile_whole(
                whole, mode=self.mode, what="the attack", say=self.say, otherwise=plain, check=check
            )

        return self._kept(kind, make) or super().look(kind)

    def one_graph(
        self, kind: Hashable, make: Callable[[Pull[Any]], Callable[..., Any]], names: Sequence[str] = ()
    ) -> Callable[..., Any]:
        def compiled() -> Callable[..., Any]:
            bare = replace(self, _graphs={})
            plain, whole = Ascent.one_graph(bare, kind, make), make(bare._functional_pull)
            check = CompileCheck(self._module, names=names)
            return compile_whole(
                whole, mode=self.mode, what="the search", say=self.say, otherwise=plain, check=check
            )

        return self._kept(kind, compiled) or super().one_graph(kind, make)

    @property
    def _module(self) -> nn.Module | None:
        return self.network if isinstance(self.network, nn.Module) else None

    def _kept(self, kind: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | None:
        """The graph of `kind`, made where there is room for it; None where there is none."""
        if kind not in self._graphs:
            if len(self._graphs) >= MAX_KINDS:
                if not self._said:
                    self._said.append(
                        f"{MAX_KINDS} kinds of attack are compiled; further ones run without torch.compile"
                    )
                    self.say(self._said[0])
                return None
            self._graphs[kind] = make()
        return self._graphs[kind]

    def _functional_linearize(self, read: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        if not self.closed_form:

            def loss(leaf: Tensor) -> tuple[Tensor, Tensor]:
                logits = self.logits(leaf.view_as(leaf))
                return goal.per_image(logits).sum() * self.underflow.loss_scale, logits

            grad, logits = torch.func.grad(loss, has_aux=True)(read)
            return logits, grad
        return self._functional_pull(read, lambda logits: (self.upstream(logits, goal), logits))

    def _functional_pull(self, read: Tensor, weigh: Callable[[Tensor], tuple[Tensor, T]]) -> tuple[T, Tensor]:
        # Dynamo drops the gradient of an autograd.Function that reads the differentiated tensor itself; of a
        # view it does not.
        pulled: Any = torch.func.vjp(lambda leaf: self.logits(leaf.view_as(leaf)), read)
        logits, pull_back = pulled
        weights, found = weigh(logits)
        return found, pull_back(weights)[0]
