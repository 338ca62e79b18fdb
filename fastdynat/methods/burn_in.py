"""The burn-in before a delayed start: natural training of every network that a method trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import Inner, Method, Networks, Outer
from fastdynat.methods.building_blocks import batch_share
from fastdynat.methods.natural import Natural, NaturalOptions


class BurnIn(Natural):
    """``min CE(f(x), y)`` for the model and, where `method` trains one, for the guide."""

    def __init__(self, method: Method[Any]) -> None:
        super().__init__(NaturalOptions())
        self.trains, self.label_smoothing = method.trains, method.label_smoothing

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        if "guide" not in self.trains:
            return super().inner(nets, batch)
        assert nets.guide is not None
        guide = self.fit(nets.guide(batch.x), batch)
        return Inner(goal=None, guide=guide, losses={"guide": guide.loss})

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        outer = super().outer(nets, batch, inner, attacked)
        if inner.guide is None:
            return outer
        guide = {
            "guide_loss": inner.guide.loss.detach(),
            "guide_acc": batch_share(inner.guide.target_correct, batch),
        }
        return replace(outer, logs=outer.logs | guide)
