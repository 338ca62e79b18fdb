"""One training step: inner attack, outer losses, backward pass, update."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD

from fastdynat.attack_engine.attack_result import as_attack_result
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.execution.fallbacks import Fallbacks, WarnedFallbacks
from fastdynat.execution.graph_capture import Recorder
from fastdynat.execution.graphed_call import GraphedCall
from fastdynat.execution.uncompiled import uncompiled
from fastdynat.methods import Inner, Method
from fastdynat.methods.halves import check_inner, check_outer
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.cycled_sgd import CycledSGD
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.resolved_config import ResolvedOptim
from fastdynat.training.step_state import StepState

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # batch and instance norm are _NormBase


def build_optimizers(
    networks: dict[str, nn.Module], config: ResolvedOptim, lr: Tensor, *, cycled: bool = False
) -> list[SGD]:
    """SGD over all parameters of each network ("separate"), or one SGD over both ("joint").

    Args:
        lr: scalar tensor on the networks' device, which the schedule writes to: a captured step reads it anew
            at each replay.
        cycled: the caller will replace each group's momentum by such a tensor too.
    """
    groups = [_groups(module, config) for module in networks.values()]

    def sgd(members: list[dict[str, Any]]) -> SGD:
        usual: dict[str, Any] = {"lr": lr, "momentum": config.momentum, "nesterov": config.nesterov}
        usual["weight_decay"] = config.weight_decay
        # Fused: one pass over the parameters, and torch's only implementation that does not read a tensor
        # rate.
        optimizer = CycledSGD(members, **usual) if cycled else SGD(members, **usual, fused=True)
        if config.momentum > 0:
            # torch leaves the buffers uninitialised where its first step is skipped because fp16 overflowed.
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    return [sgd([*chain(*groups)])] if config.optimizers == "joint" else [sgd(group) for group in groups]


def _groups(module: nn.Module, config: ResolvedOptim) -> list[dict[str, Any]]:
    """The parameter groups of one network: normalisation layers apart where they have no weight decay."""
    if config.decay_norms:
        return [{"params": list(module.parameters())}]
    norms = {
        id(p)
        for layer in module.modules()
        if isinstance(layer, NORMS)
        for p in layer.parameters(recurse=False)
    }
    decayed = [p for p in module.parameters() if id(p) not in norms]
    rest = [p for p in module.parameters() if id(p) in norms]
    return [{"params": decayed}] + [{"params": rest, "weight_decay": 0.0}] * bool(rest)


@contextmanager
def replaced_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which each pass in train mode replaces the running statistics of `module` (momentum 1)."""
    layers = [
        layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.momentum is not None
    ]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, usual, strict=True):
            layer.momentum = momentum


class StepResult(NamedTuple):
    """Detached scalars, and the images of the last update, on which a captured graph is checked."""

    metrics: dict[str, Tensor]
    images: Tensor


class TrainStep:
    """Solves a method's min-max problem on one batch and updates the networks.

    Attributes:
        optimizers: updated together after the backward passes of all of the method's losses.
        global_step: batches so far; drives the schedule.
        statistics_resets: as given.
        path: how the step runs, in words.
        fallbacks: speed-ups that were asked for and are not used.

    Args:
        recorder: captures the whole step as a graph; None runs it uncaptured. Not with a gradient scaler,
            which waits for the device.
        steps_of: the attack's number of steps in an epoch, counted from 0; None is always `spec.steps`.
        guide_stream: CUDA stream of the method's inner half and its losses, beside the attack; None is the
            current one.
        awp: perturbs the model's weights around its loss.
        momentum: the momentum of update number n, counted from 0; None is always `optim.momentum`.
        statistics_resets: numbers of the updates whose passes replace the model's running statistics by the
            batch's.
        whole: images in a full batch. Smaller batches run uncompiled and uncaptured, with the same
            mathematics: graphs of their own would take a minute. None compiles and captures batches of any
            size.
        fallbacks: collects why graphs are off (a capture fails, a replay differs from the step) and that
            partial batches run uncompiled; None warns.
    """

    def __init__(
        self,
        method: Method[Any],
        networks: NetworkSet,
        spec: PGDSpec,
        optim: ResolvedOptim,
        precision: Precision,
        lr_factor: Callable[[int], float],
        *,
        recorder: Recorder | None = None,
        guide_stream: torch.cuda.Stream | None = None,
        steps_of: Callable[[int], int] | None = None,
        awp: WeightPerturbation | None = None,
        momentum: Callable[[int], float] | None = None,
        statistics_resets: Collection[int] = (),
        whole: int | None = None,
        fallbacks: Fallbacks | None = None,
    ) -> None:
        self.method, self.networks, self.spec = method, networks, spec
        self.optim, self.precision, self.lr_factor = optim, precision, lr_factor
        self.peak_lr = optim.lr
        # The fused update reads float32 on CUDA devices, and anything on the CPU.
        exact = torch.float32 if precision.device.type == "cuda" else torch.float64
        self._lr = torch.zeros((), dtype=exact, device=precision.device)
        self._momentum_at, self._momentum = momentum, torch.full_like(self._lr, optim.momentum)
        trained = {name: networks.raw[name] for name in method.trains}
        self.optimizers = build_optimizers(trained, optim, self._lr, cycled=momentum is not None)
        self.statistics_resets = frozenset(statistics_resets)
        self.global_step = 0
        self._guide_stream = guide_stream
        self._steps_of = steps_of or (lambda epoch: spec.steps)
        self.awp = awp
        parts = [f"compile {networks.compile_mode}"] * (networks.compile_mode != "off")
        parts += ["one CUDA graph"] * (recorder is not None) + ["guide on its own stream"] * (
            guide_stream is not None
        )
        self.path = ", ".join(parts) or "eager"
        self.fallbacks, self._whole = fallbacks or WarnedFallbacks(), whole
        self._graphed = (
            None if recorder is None else GraphedCall(self._run, recorder, self.fallbacks, self._subject())
        )
        attack = networks.attack.switches
        self._by_shape = ["torch.compile"] * ({networks.compile_mode, attack.compile} != {"off"})
        self._by_shape += ["CUDA graphs"] * (recorder is not None or attack.graphs)
        self._told = False

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Update on `batch`; returns detached scalars on the device, each a mean over the batch's images.

        They are overwritten by the next call where the step is a captured graph.
        """
        self._set_rates()
        smaller = self._whole is not None and len(batch.labels) < self._whole
        if smaller:
            self._tell_of_smaller(len(batch.labels))
        resets = self.global_step in self.statistics_resets
        aside = uncompiled() if smaller else nullcontext()
        with aside, replaced_statistics(self.networks.raw["model"]) if resets else nullcontext():
            if self._graphed is None:
                result = self._run(batch.x, batch.labels, batch.indices)
            else:
                constants = (self.spec.steps, self._awp_is_on(), resets, *self.method.constants())
                result = self._graphed(batch.x, batch.labels, batch.indices, constants=constants)
        self.networks.average()
        self.global_step += 1
        return result.metrics

    def _tell_of_smaller(self, images: int) -> None:
        if self._by_shape and not self._told:
            self._told = True
            how = " and ".join(self._by_shape)
            self.fallbacks.add(
                f"the last {images} images of an epoch are a partial batch and run without {how}; "
                "--drop-last leaves them out"
            )

    def _set_rates(self) -> None:
        """Write this update's rate and cycled momentum into the tensors that a captured step reads."""
        self._lr.fill_(self.learning_rate(self.global_step))
        if self._momentum_at is not None:
            self._momentum.fill_(self._momentum_at(self.global_step))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self._lr  # loading a state has put another tensor there
            if self._momentum_at is not None:
                group["momentum"] = self._momentum

    def start_epoch(self, epoch: int) -> None:
        """Set the method's completed epochs and the attack's number of steps."""
        self.method.epoch = epoch
        self.spec = replace(self.spec, steps=self._steps_of(epoch))

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, counted from 0."""
        return self.peak_lr * self.lr_factor(step)

    def _subject(self) -> StepState:
        rates = {"of learning": self._lr, "of momentum": self._momentum}
        return StepState(self.networks, self.optimizers, self.method, rates)

    def _run(self, x: Tensor, labels: Tensor, indices: Tensor) -> StepResult:
        """The step as it is captured: it never waits for the device, and changes no number held by Python."""
        batch = Batch(x, labels, indices)
        for _ in range(self.method.replays):
            result = self._one_update(batch)
        return result

    def _one_update(self, batch: Batch) -> StepResult:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.networks.attack.refresh()
        inner = self._inner(batch)
        attack = Attacker(self.networks.attack, self.spec)
        found = self.method.perturb(self.networks.views, batch, inner, attack)
        attacked = as_attack_result(found, batch.x, f"{type(self.method).__name__}.perturb")
        with self.precision.autocast():
            self.method.after_attack(self.networks.views, batch, attacked)
        with self._perturbed_weights(batch, inner, attacked):
            with self.precision.autocast():
                outer = self.method.outer(self.networks.views, batch, inner, attacked)
            check_outer(self.method, inner, outer)
            self._backward(outer.losses)
            if self._guide_stream is not None:
                torch.cuda.current_stream().wait_stream(self._guide_stream)
            self.method.after_backward(batch, attacked, attack)
            self._update()
        with self.precision.autocast():
            self.method.after_update(self.networks.views, batch)
        zeros = {"zero_grad_share": attacked.zero_grads / attacked.gradients} if attacked.gradients else {}
        return StepResult({**outer.logs, **zeros}, attacked.x_adv)

    def _awp_is_on(self) -> bool:
        return self.awp is not None and self.method.epoch >= self.awp.warmup

    def _perturbed_weights(
        self, batch: Batch, inner: Inner, attacked: AttackResult
    ) -> AbstractContextManager[None]:
        if self.awp is None or not self._awp_is_on():
            return nullcontext()
        nets = replace(self.networks.views, model=self.networks.views.unmoved)
        with self.precision.autocast():
            loss = self.method.awp_loss(nets, batch, inner, attacked)
        return self.awp.around(self.precision.scaler.scale(loss))

    def _inner(self, batch: Batch) -> Inner:
        """The method's inner half and the backward pass of its losses, which do not depend on the attack."""
        side, labels_made = self._guide_stream, None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with nullcontext() if side is None else torch.cuda.stream(side):
            with self.precision.autocast():
                inner = self.method.inner(self.networks.views, batch)
            if side is not None:
                labels_made = side.record_event()
            check_inner(self.method, inner)
            self._backward(inner.losses)
        if labels_made is not None:
            torch.cuda.current_stream().wait_event(labels_made)
        return inner

    def _backward(self, losses: dict[str, Tensor]) -> None:
        if losses:
            self.precision.scaler.scale(torch.stack(list(losses.values())).sum()).backward()

    def _update(self) -> None:
        scaler = self.precision.scaler
        for optimizer in self.optimizers:
            if self.optim.clip_grad > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(
                    [p for g in optimizer.param_groups for p in g["params"]], self.optim.clip_grad
                )
            scaler.step(optimizer)
        scaler.update()
