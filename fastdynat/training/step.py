"""One training step: inner attack, outer losses, backward pass, update."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.attack_result import as_attack_result
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch
from fastdynat.distributed import replicated_batch, world
from fastdynat.distributed.running_statistics import average_statistics
from fastdynat.distributed.shares import Share
from fastdynat.execution.compiling import retained_graphs
from fastdynat.execution.fallbacks import Fallbacks, WarnedFallbacks
from fastdynat.execution.graph_capture import Recorder
from fastdynat.execution.graphed_call import GraphedCall
from fastdynat.execution.uncompiled import uncompiled
from fastdynat.methods import Inner, Method
from fastdynat.methods.halves import check_inner, check_outer
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.gradient_sums import GradientSums
from fastdynat.training.method_buffers import rows_per_image
from fastdynat.training.micro_batches import (
    MicroBatch,
    buffer_rows,
    joined_logs,
    micro_batches,
    shared_loss,
)
from fastdynat.training.networks import NetworkSet
from fastdynat.training.optimizers import build_optimizers
from fastdynat.training.precision import Precision
from fastdynat.training.replaced_statistics import replaced_statistics
from fastdynat.training.resolved_config import ResolvedOptim
from fastdynat.training.step_draws import StepDraws
from fastdynat.training.step_rates import StepRates
from fastdynat.training.step_state import StepState
from fastdynat.training.training_norms import TrainingNorms


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
        sizes: (eps, step size) of the attack at update number n; None is always those of `spec`.
        statistics_resets: numbers of the updates whose passes replace the model's running statistics by the
            batch's.
        whole: images in a full batch of all ranks. Smaller batches run uncompiled and uncaptured, with the
            same mathematics: graphs of their own would take a minute. None compiles and captures batches of
            any size.
        accumulate: micro-batches that a batch is cut into, to save memory: attacks and losses one by one, a
            single update.
        others: attacks under other norms beside `spec`, used as `norm_choice` says (`TrainingNorms`).
        seed: of all random numbers of the attacks, which depend on it, the step and the image alone; None
            draws from torch's global generator.
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
        sizes: Callable[[int], tuple[float, float]] | None = None,
        statistics_resets: Collection[int] = (),
        whole: int | None = None,
        accumulate: int = 1,
        others: Sequence[PGDSpec] = (),
        norm_choice: str = "alternate",
        seed: int | None = None,
        fallbacks: Fallbacks | None = None,
    ) -> None:
        self._norms = TrainingNorms((spec, *others), norm_choice)
        self.method, self.networks, self.spec = method, networks, spec
        self.optim, self.precision, self.lr_factor = optim, precision, lr_factor
        self.peak_lr, self.sizes = optim.lr, sizes
        self.rates = StepRates(self.learning_rate, optim.momentum, momentum, precision.device, sizes)
        trained = {name: networks.raw[name] for name in method.trains}
        self.optimizers = build_optimizers(trained, optim, self.rates.lr, cycled=momentum is not None)
        self.rates.adopt(self.optimizers)
        self._world, self._accumulate, self._share = world(), accumulate, Share(0)
        self._trained = [*trained.values()]
        self._sums = GradientSums(self._trained, self._world)
        self._draws = None if seed is None else StepDraws(seed, precision.device)
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
        self._graphed: GraphedCall | None = None
        if recorder is not None:
            on_all = None if self._world.alone else self._well_on_all
            self._graphed = GraphedCall(self._run, recorder, self.fallbacks, self._subject(), on_all=on_all)
        attack = networks.attack.switches
        self._by_shape = ["torch.compile"] * ({networks.compile_mode, attack.compile} != {"off"})
        self._by_shape += ["CUDA graphs"] * (recorder is not None or attack.graphs)
        self._told = False
        self._retains = method.retains_graph and networks.compile_mode != "off"

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Update on `batch`; returns detached scalars on the device, each a mean over the batch's images.

        They are overwritten by the next call where the step is a captured graph.
        """
        self.rates.write(self.global_step, self.optimizers)
        if self._draws is not None:
            self._draws.begin(self.global_step)
        self._share = batch.share
        smaller = self._whole is not None and batch.share.total < self._whole
        if smaller:
            self._tell_of_smaller(batch.share.total)
        resets = self.global_step in self.statistics_resets
        with (
            uncompiled() if smaller else nullcontext(),
            replaced_statistics(self.networks.passes["model"]) if resets else nullcontext(),
            replicated_batch() if batch.share.replicated else nullcontext(),
            retained_graphs() if self._retains else nullcontext(),
        ):
            inputs = (batch.x, batch.labels, batch.indices, *([] if batch.mixed is None else [batch.mixed]))
            if self._graphed is None:
                result = self._run(*inputs)
            else:
                constants = (
                    self.spec.steps,
                    self._norms.turn(self.global_step),
                    resets,
                    batch.share,
                    *self._constants_of_epoch(),
                )
                result = self._graphed(*inputs, constants=constants)
        self.networks.average_step()
        self.global_step += 1
        self.method.epoch_step += 1
        return result.metrics

    def _tell_of_smaller(self, images: int) -> None:
        if self._by_shape and not self._told:
            self._told = True
            how = " and ".join(self._by_shape)
            self.fallbacks.add(
                f"the last {images} images of an epoch are a partial batch and run without {how}; "
                "--drop-last leaves them out"
            )

    def release(self) -> None:
        """Free the step's graphs: the group whose collectives they hold cannot be left while they live."""
        if self._graphed is not None:
            self._graphed.release()

    def start_epoch(self, epoch: int, done: int = 0) -> None:
        """Tell the method its completed epochs, and set the attack's number of steps.

        done: batches of this epoch that were trained before.
        """
        self.method.epoch, self.method.epoch_step = epoch, done
        self.method.begin_epoch()
        self.spec = replace(self.spec, steps=self._steps_of(epoch))

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, counted from 0."""
        return self.peak_lr * self.lr_factor(step)

    def _well_on_all(self, here: bool) -> bool:
        return self._world.maximum(float(not here)) == 0

    def _subject(self) -> StepState:
        draws = {} if self._draws is None else {"random state": self._draws.state}
        rates = self.rates.tensors()
        return StepState(
            self.networks,
            self.optimizers,
            self.method,
            rates,
            draws,
            self.rates.sizes,
            self._constants_of_epoch,
        )

    def _constants_of_epoch(self) -> tuple[Any, ...]:
        """The values that Python computes for a step from the method's `epoch` and `epoch_step`."""
        return (self._awp_is_on(), *self.method.constants())

    def _run(self, x: Tensor, labels: Tensor, indices: Tensor, mixed: Tensor | None = None) -> StepResult:
        """The step as it is captured: it never waits for the device, and changes no number held by Python."""
        batch = Batch(x, labels, indices, self._share, mixed)
        for replay in range(self.method.replays):
            result = self._one_update(batch, replay)
        return result

    def _one_update(self, batch: Batch, replay: int) -> StepResult:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.networks.attack.refresh()
        parts = self._parts(batch, replay)
        if self._awp_is_on():
            for part in parts:
                self._attack(part)
            with self._perturbed_weights(parts):
                for part in parts:
                    self._minimize(part)
                self._update()
        else:
            together = self._norms.attacks_per_batch  # no attack sees statistics that another's pass moved
            for group in (parts[i : i + together] for i in range(0, len(parts), together)):
                for part in group:
                    self._attack(part)
                for part in group:
                    self._minimize(part)
            self._update()
        for part in parts[:: self._norms.attacks_per_batch]:
            with part.rows(), self.precision.autocast():
                self.method.after_update(self.networks.views, part.batch)
        average_statistics(self._trained, self._world, weight=batch.share.weight)
        logs = joined_logs([part.logs for part in parts], [part.batch for part in parts])
        return StepResult(logs, parts[-1].attacked.x_adv)

    def _parts(self, batch: Batch, replay: int) -> list[MicroBatch]:
        cut = micro_batches(batch, self._accumulate)
        shared = len(cut) > 1 or batch.share.replicated
        names = rows_per_image(self.method, tuple(batch.x.shape[1:])) if shared else set[str]()
        choices = self._norms.choices(self.global_step, self.spec.steps)
        return [
            MicroBatch(
                one,
                self._attacker(one, replay * len(choices) + number, specs),
                partial(buffer_rows, self.method, names, rows, batch.share, self._world),
                last=one is cut[-1][0] and number == len(choices) - 1,
                weight=1 / len(choices),
            )
            for one, rows in cut
            for number, specs in enumerate(choices)
        ]

    def _attacker(self, batch: Batch, number: int, specs: tuple[PGDSpec, ...]) -> Attacker:
        """The attacker of attack `number` on `batch`; of several `specs` an image gets the worst."""
        draws = None if self._draws is None else self._draws.of(batch.indices, number)
        sizes = self.rates.sizes
        return Attacker(self.networks.attack, specs[0], draws=draws, sizes=sizes, others=specs[1:])

    def _awp_is_on(self) -> bool:
        return self.awp is not None and self.method.epoch >= self.awp.warmup

    def _perturbed_weights(self, parts: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        assert self.awp is not None
        nets = replace(self.networks.views, model=self.networks.views.unmoved)

        def loss(part: MicroBatch) -> Tensor:
            with part.rows(), self.precision.autocast():
                loss = self.method.awp_loss(nets, part.batch, part.inner, part.attacked)
            return self.precision.scaler.scale(shared_loss(loss, part))

        return self.awp.around((loss(part) for part in parts), self._sums.sum_)

    def _attack(self, part: MicroBatch) -> None:
        """The inner half on one part, and the attack."""
        with part.rows():
            part.inner = self._inner(part)
            name = f"{type(self.method).__name__}.perturb"
            found = self.method.perturb(self.networks.views, part.batch, part.inner, part.attack)
            part.attacked = as_attack_result(found, part.batch.x, name)
            with self.precision.autocast():
                self.method.after_attack(self.networks.views, part.batch, part.attacked)

    def _minimize(self, part: MicroBatch) -> None:
        """The outer half on one part, and the backward pass of its losses."""
        batch, inner, attacked = part.batch, part.inner, part.attacked
        with part.rows():
            with self.precision.autocast():
                outer = self.method.outer(self.networks.views, batch, inner, attacked)
            check_outer(self.method, inner, outer)
            self._backward(outer.losses, part)
            if self._guide_stream is not None:
                self._main_stream().wait_stream(self._guide_stream)
            self.method.after_backward(batch, attacked, part.attack)
        zeros = {"zero_grad_share": attacked.zero_grads / attacked.gradients} if attacked.gradients else {}
        part.logs = {**outer.logs, **zeros, **self._norms.logs(part, outer.logs)}

    def _inner(self, part: MicroBatch) -> Inner:
        """The method's inner half and the backward pass of its losses, which do not depend on the attack."""
        side, labels_made = self._guide_stream, None
        if side is not None:
            side.wait_stream(self._main_stream())
        with nullcontext() if side is None else torch.cuda.stream(side):
            with self.precision.autocast():
                inner = self.method.inner(self.networks.views, part.batch)
            if side is not None:
                labels_made = side.record_event()
            check_inner(self.method, inner)
            self._backward(inner.losses, part)
            if part.last:
                for name in inner.losses:  # their gradients are summed beside the attack
                    self._sums.begin(self.networks.raw[name])
        if labels_made is not None:
            self._main_stream().wait_event(labels_made)
        return inner

    def _main_stream(self) -> torch.cuda.Stream:
        """The current stream of the networks' device, which need not be the process's current device."""
        return torch.cuda.current_stream(self.precision.device)

    def _backward(self, losses: dict[str, Tensor], part: MicroBatch) -> None:
        if losses:
            loss = shared_loss(torch.stack(list(losses.values())).sum(), part)
            self.precision.scaler.scale(loss).backward()

    def _update(self) -> None:
        self._sums.finish()
        scaler = self.precision.scaler
        for optimizer in self.optimizers:
            if self.optim.clip_grad > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(
                    [p for g in optimizer.param_groups for p in g["params"]], self.optim.clip_grad
                )
            scaler.step(optimizer)
        scaler.update()
