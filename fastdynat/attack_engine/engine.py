"""The attack engine: PGD on a folded replica of the network, compiled and captured as one CUDA graph."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, LogitGrad, T, Underflow
from fastdynat.attack_engine.attack_result import AttackResult, R
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.compiled_ascent import CompiledAscent
from fastdynat.attack_engine.compiled_attack_check import compiled_shortfall
from fastdynat.attack_engine.goal import AttackGoal, GoalKind
from fastdynat.attack_engine.network_modes import has_batch_norm
from fastdynat.attack_engine.network_probe import gradient_reaches
from fastdynat.attack_engine.pgd import run_pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.attack_engine.replica_state import ReplicaState
from fastdynat.attack_engine.worst_norm import worst_of
from fastdynat.execution.compiling import AUTO, MAX_SIGNATURES, compile_whole
from fastdynat.execution.fallbacks import Fallbacks, WarnedFallbacks
from fastdynat.execution.float32 import float32_name
from fastdynat.execution.graph_capture import CudaRecorder, Recorder
from fastdynat.execution.graphed_call import GraphedCall
from fastdynat.execution.synchronization import waits_on_purpose
from fastdynat.execution.uncompiled import is_uncompiled
from fastdynat.models.logits import NoGradient
from fastdynat.ops import Size, prepare
from fastdynat.ops.image_draws import ImageDraws, Randomness


class AttackEngine:
    """Runs attacks on a replica of `model`; `refresh` copies the model's weights to it.

    Attributes:
        replica: the attacked network.
        switches: as given, except what `model` cannot run with.
        fallbacks: the switches that could not be followed, with the reasons.
        ascent: logits and input gradients of the replica, for attacks other than PGD; their images must be in
            `to_memory_format`.
        compares: as in `AttackReplica`.
    """

    compares = False

    @waits_on_purpose()
    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        bn: str = "eval",
        switches: AttackSwitches | None = None,
        rescale: bool | None = None,
        allow_no_gradient: bool = False,
        fallbacks: Fallbacks | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            model: images in [0, 1] -> logits.
            example: (n, C, H, W) images on the model's device (`AttackReplica`).
            bn: batch norm during the attack, "eval", "train" or "frozen" (`set_attack_mode`).
            rescale: as in `Underflow.guard`.
            allow_no_gradient: as in `Ascent`.
            fallbacks: collects the switches that cannot be followed, with the reasons; None warns.
            recorder: captures graphs; None uses CUDA's where the switches ask for graphs.

        Raises:
            UserError: `model` returns no logits; no gradient reaches the images, unless `allow_no_gradient`.
        """
        if not gradient_reaches(model, example) and not allow_no_gradient:
            raise NoGradient
        self.fallbacks = fallbacks or WarnedFallbacks()
        s = self._deterministic(switches or AttackSwitches())
        static = s.compile != "off" or s.graphs or recorder is not None
        if static:
            prepare(example.device)  # operators verify themselves now: compilers and captures cannot wait
        self._recorder = recorder
        self.replica = AttackReplica(
            model, example, bn=bn, static=static, compares=self.compares, **_replica_options(s, bn)
        )
        self.switches = s = replace(s, channels_last=self.replica.channels_last)
        if self.replica.note and has_batch_norm(model):
            self.fallbacks.add(f"batch norm is not folded in the attack: {self.replica.note}")
        underflow = Underflow.guard(bn, s.dtype, rescale if s.closed_form or rescale else False)
        self.ascent = self._ascent_of(bn, underflow, allow_no_gradient)
        if recorder is None and s.graphs:
            self._recorder = CudaRecorder(example.device)
        self._captured: dict[Hashable, GraphedCall] = {}
        self._checked: set[Any] = set()
        self._state = ReplicaState(self.replica, moves=bn == "train")
        self._planned = _path(self.replica, s, bn, example.device)

    def _deterministic(self, switches: AttackSwitches) -> AttackSwitches:
        """`switches` without what is not deterministic, where torch is asked to be."""
        if not switches.fused_conv or not torch.are_deterministic_algorithms_enabled():
            return switches
        self.fallbacks.add(
            "convolutions of the attack are not fused with their ReLU: "
            "cuDNN's fused kernels are not deterministic"
        )
        return replace(switches, fused_conv=False)

    def _ascent_of(self, bn: str, underflow: Underflow, allow_no_gradient: bool) -> Ascent:
        s, network = self.switches, self.replica.network
        if s.compile == "off":
            return Ascent(network, underflow, s.dtype, s.closed_form, allow_no_gradient=allow_no_gradient)
        if bn == "eval":
            return CompiledAscent(
                network,
                underflow,
                s.dtype,
                s.closed_form,
                s.compile,
                self.fallbacks,
                allow_no_gradient=allow_no_gradient,
            )
        # A functional gradient cannot update batch statistics, so only the network is compiled. Timing runs
        # would update them too, so "auto" compiles without timing.
        mode = "default" if s.compile == AUTO else s.compile
        compiled = compile_whole(network, mode=mode, what="the attacked network", fallbacks=self.fallbacks)
        return Ascent(compiled, underflow, s.dtype, s.closed_form, allow_no_gradient=allow_no_gradient)

    @property
    def path(self) -> str:
        """The attack's execution in words: the modes in use and every one that was given up."""
        return "; ".join([self._planned, *self.fallbacks.texts])

    @property
    def captures(self) -> bool:
        """True if attacks run as CUDA graphs, each after `WARM_UP_CALLS` calls with inputs like its own."""
        return self._recorder is not None

    def refresh(self) -> None:
        """Copy the model's weights and statistics to the replica; needed after every change of them."""
        self.replica.refresh()

    def prepare(self, x: Tensor, passes: float = math.inf) -> None:
        """Prepare the replica for attacks by `ascent` on images like `x`; `run` and `captured` do so.

        passes: pairs of forward and backward passes to come (`WinogradLayers.prepare`).
        """
        x = self.to_memory_format(x)
        self.replica.prepare(x, passes)
        # Returns before `x` is rounded, at every attack but the first.
        if self.replica.fusion_chosen or not self.switches.fused_where_faster:
            return
        compiled = self.switches.compile != "off"
        with waits_on_purpose(), self.ascent.autocast(x):
            slower = self.replica.choose_fusion(self.ascent.to_model_input(x), compiled=compiled)
        if slower:
            self.fallbacks.add(
                f"{slower} convolutions of the attack are not fused with their ReLU: "
                "fusion measured slower on this GPU"
            )

    def to_memory_format(self, x: Tensor) -> Tensor:
        """Images `x` in the memory format of the replica."""
        return x.contiguous(
            memory_format=torch.channels_last if self.switches.channels_last else torch.contiguous_format
        )

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the replica, in the attack's precision."""
        return self.ascent.logits(x)

    def gradient(self, x: Tensor, goal: AttackGoal) -> Tensor:
        """The gradient of `goal` at images `x`, as a first step follows it; never compiled."""
        return self.ascent.gradient(self.ascent.to_model_input(self.to_memory_format(x)), goal)

    def value_and_grad(self, x: Tensor, logit_grad: LogitGrad[T]) -> tuple[T, Tensor]:
        """`Ascent.value_and_grad` at images `x`; never compiled."""
        return self.ascent.value_and_grad(self.ascent.to_model_input(self.to_memory_format(x)), logit_grad)

    def margin_and_grad(self, x: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`Ascent.margin_and_grad` at images `x`; never compiled."""
        model_input = self.ascent.to_model_input(self.to_memory_format(x))
        return self.ascent.margin_and_grad(model_input, labels, temperature)

    def run(
        self,
        x: Tensor,
        goal: AttackGoal,
        spec: PGDSpec,
        *,
        x_start: Tensor | None = None,
        sizes: Tensor | None = None,
        generator: Randomness = None,
    ) -> AttackResult:
        """`run_pgd` on the replica. x: (N, C, H, W) float32 or float64 in [0, 1]; the caller sets grad mode.

        With a ``torch.Generator`` the attack is not captured: a graph draws from the device's default one.
        `ImageDraws` are inputs of the graph, and give the attack one draw (`ImageDraws.fork`). `sizes` are
        one too: other values capture nothing and compile nothing.
        """
        x = self.to_memory_format(x)
        x_start = None if x_start is None else self.to_memory_format(x_start)
        self.prepare(x, spec.steps * spec.restarts)
        self._check_compiled(x, goal, spec)
        if isinstance(generator, torch.Generator):
            return run_pgd(self.ascent, x, goal, spec, x_start=x_start, sizes=sizes, generator=generator)
        given = tuple(t for t in (x_start, sizes) if t is not None)
        sized = sizes is not None
        attack = partial(_run_pgd, kind=goal.kind, spec=spec, sized=sized)
        return self._call(attack, (x, goal.target, *given), draws=generator, key=(goal.kind, spec, sized))

    def captured(
        self,
        fn: Callable[..., R],
        x: Tensor,
        *inputs: Tensor,
        key: Hashable,
        passes: float,
        draws: ImageDraws | None = None,
    ) -> R:
        """``fn(ascent, x, *inputs)`` on the replica, as one CUDA graph where the engine captures attacks.

        Args:
            fn: an attack that does the same work for all inputs of one shape (`GraphedCall`). It draws from
                the device's default generator, or with `draws` from the `ImageDraws` that it is passed as
                `generator`.
            x: (N, C, H, W) images in [0, 1]; they and other images in `inputs` are brought to the replica's
                memory format.
            key: equal for functions that compute the same.
            passes: pairs of forward and backward passes that `fn` takes.
            draws: of the images; the attack takes one draw of them (`ImageDraws.fork`).
        """
        x = self.to_memory_format(x)
        self.prepare(x, passes)
        images_and_others = (self.to_memory_format(t) if t.dim() == 4 else t for t in inputs)
        return self._call(fn, (x, *images_and_others), draws=draws, key=key)

    def _call(
        self, fn: Callable[..., R], inputs: tuple[Tensor, ...], *, draws: ImageDraws | None, key: Hashable
    ) -> R:
        if draws is not None:
            own = draws.fork()
            fn, inputs, key = partial(_drawing, fn), (*inputs, own.state, own.images), ("draws", key)
        attack: Callable[..., R] = partial(fn, self.ascent)
        if self._recorder is None:
            return attack(*inputs)
        if key not in self._captured:
            self._captured[key] = GraphedCall(attack, self._recorder, self.fallbacks, self._state)
        result: R = self._captured[key](*inputs)
        return result.clone()  # the next call overwrites the graph's own outputs

    def _check_compiled(self, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> None:
        """Before the first compiled attack of each kind and shape: stop compiling if the attack is weaker."""
        ascent, seen = self.ascent, (goal.kind, spec.norm, spec.algorithm, tuple(x.shape), x.dtype)
        if not isinstance(ascent, CompiledAscent) or seen in self._checked:
            return
        if len(self._checked) >= MAX_SIGNATURES or len(x) == 0 or is_uncompiled():
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self._checked.add(seen)
        eager = ascent.eager()
        if why := compiled_shortfall(ascent, eager, x, goal, spec):
            self.fallbacks.add(f"the attack runs without torch.compile: when compiled, {why}")
            self.ascent = eager


def _run_pgd(
    ascent: Ascent,
    x: Tensor,
    target: Tensor,
    *given: Tensor,
    kind: GoalKind,
    spec: PGDSpec,
    sized: bool,
    generator: Randomness = None,
) -> AttackResult:
    """`run_pgd` on inputs of a graph. given: the start, if there is one, and if `sized` the sizes."""
    starts, sizes = (given[:-1], given[-1]) if sized else (given, None)
    x_start = starts[0] if starts else None
    goal = AttackGoal.from_kind(kind, target)
    return run_pgd(ascent, x, goal, spec, x_start=x_start, sizes=sizes, generator=generator)


def _drawing(fn: Callable[..., R], ascent: Ascent, *inputs: Tensor) -> R:
    """`fn` with the draws of one attack, whose state and images are the last two inputs."""
    *others, state, images = inputs
    return fn(ascent, *others, generator=ImageDraws(state, images, 1))


@dataclass(frozen=True)
class Attacker:
    """An engine and the attack that a run is configured with, as a training method calls them.

    Attributes:
        draws: random numbers of the batch's images, for the attack and for what a method draws itself; None
            is torch's global generator.
        sizes: float64 (2,) on the device, [eps, step size] of this update, where a ramp changes those of
            `spec`, which then has the final ones; None without a ramp.
        others: attacks under other norms; an image gets the worst of all (`worst_of`).
    """

    engine: AttackEngine
    spec: PGDSpec
    draws: ImageDraws | None = None
    sizes: Tensor | None = None
    others: tuple[PGDSpec, ...] = ()

    @property
    def eps(self) -> Size:
        """The radius of this update: a number, or under a ramp a scalar on the device."""
        return self.spec.eps if self.sizes is None else self.sizes[0]

    @property
    def step_size(self) -> Size:
        """The step size of this update: a number, or under a ramp a scalar on the device."""
        return self.spec.step_size if self.sizes is None else self.sizes[1]

    def take(self, rows: Tensor | slice) -> "Attacker":
        """The attacker of some of the batch's images, by their indices, a mask or a slice."""
        return self if self.draws is None else replace(self, draws=self.draws.take(rows))

    def __call__(
        self,
        x: Tensor,
        goal: AttackGoal,
        *,
        spec: PGDSpec | None = None,
        x_start: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> AttackResult:
        """`AttackEngine.run` with `spec` and `sizes`, or the run's own.

        Raises:
            ValueError: `x` are not the images that the draws are of; under a ramp, a `spec` of another eps or
                step size without `sizes`, which would not follow it.
        """
        own, spec = spec is None, spec or self.spec
        same = (spec.eps, spec.step_size) == (self.spec.eps, self.spec.step_size)
        if self.sizes is not None and sizes is None and not same:
            raise ValueError(
                f"eps and step size follow a ramp, but this attack has its own ({spec.eps:g}, "
                f"{spec.step_size:g}); pass sizes, computed from attack.eps and attack.step_size"
            )
        if self.draws is not None and len(x) != len(self.draws):
            raise ValueError(
                f"the attack got {len(x)} images, but draws of {len(self.draws)}; attack some of a batch by "
                "attack.take(rows)(x[rows], goal)"
            )
        sizes = self.sizes if sizes is None else sizes
        if sizes is not None and own and self.others:
            raise ValueError("sizes on the device are those of one norm, not of several")
        found = [
            self.engine.run(x, goal, one, x_start=x_start, sizes=sizes, generator=self.draws)
            for one in (spec, *(self.others if own else ()))
        ]
        return worst_of(self.engine, goal, found) if len(found) > 1 else found[0]


def _replica_options(s: AttackSwitches, bn: str) -> dict[str, Any]:
    return {
        "dtype": s.dtype,
        "channels_last": s.channels_last,
        "fold": s.fold and bn == "eval",
        "fused_conv": s.fused_conv,
        "winograd": s.winograd,
    }


def _path(replica: AttackReplica, switches: AttackSwitches, bn: str, device: torch.device) -> str:
    dtype = float32_name(device) if switches.dtype is None else str(switches.dtype).removeprefix("torch.")
    parts = [f"{dtype} replica", _batch_norm_path(replica, bn)]
    parts += [f"{replica.num_fused} fused with their ReLU"] * (replica.num_fused > 0)
    parts += [f"up to {replica.num_winograd} Winograd convolutions"] * (replica.num_winograd > 0)
    parts += ["channels-last"] * switches.channels_last
    if switches.compile != "off":
        parts.append("one compiled graph" if bn == "eval" else "compiled network")
    parts += ["CUDA graph"] * switches.graphs
    return ", ".join(parts)


def _batch_norm_path(replica: AttackReplica, bn: str) -> str:
    folded, norms = replica.num_folded, replica.num_norms
    if folded:
        return (
            f"{folded} batch norms folded" if folded == norms else f"{folded} of {norms} batch norms folded"
        )
    return f"batch norm {bn}" if norms else "no batch norm"
