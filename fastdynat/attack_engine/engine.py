"""The fast attack: PGD on a replica of the network, its gradient one compiled graph, looped inside one
captured graph.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent, Underflow
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.boundary import Boundary, BoundarySpec, run_boundary
from fastdynat.attack_engine.compiled_ascent import CompiledAscent
from fastdynat.attack_engine.compiled_attack_check import disagreement
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import has_batch_norm
from fastdynat.attack_engine.network_probe import gradient_reaches
from fastdynat.attack_engine.pgd import run_pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.attack_engine.replica_state import ReplicaState
from fastdynat.execution.compiling import AUTO, MAX_SIGNATURES, compile_whole
from fastdynat.execution.float32 import float32_name
from fastdynat.execution.graph_capture import CudaRecorder, Recorder
from fastdynat.execution.graphed_call import GraphedCall
from fastdynat.execution.synchronization import waits_on_purpose
from fastdynat.execution.uncompiled import is_uncompiled
from fastdynat.models.logits import NoGradient
from fastdynat.ops import prepare
from fastdynat.tuning.devices import AMP_DTYPES, pick_channels_last, winograd_pays

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AttackSwitches:
    """What the engine may do for speed. Nothing here changes the algorithm; its numbers change by rounding.

    Attributes:
        dtype: half-precision type of the attacked network (`Ascent.dtype`); None is the model's own.
        channels_last: run it in channels-last memory format.
        fold: fold eval-mode batch norm into the layers before it.
        fused_conv: convolutions of the folded network add bias and residual and take the ReLU in one kernel
            of cuDNN, where the device has it and it is right (`fastdynat.ops.conv_relu`); on the CPU the
            operator is its definition.
        winograd: Winograd's algorithm for 3x3 convolutions, where it is faster: float32 on the CPU.
        closed_form: gradient at the logits by formula.
        compile: torch.compile mode of the gradient, "auto" (where it is measured to be faster), or "off".
        graphs: capture the whole attack as a CUDA graph per batch shape.
    """

    dtype: torch.dtype | None = None
    channels_last: bool = False
    fold: bool = True
    fused_conv: bool = False
    winograd: bool = True
    closed_form: bool = True
    compile: str = "off"
    graphs: bool = False

    @classmethod
    def fastest(
        cls, device: torch.device, dtype: torch.dtype | None = None, **others: Any
    ) -> "AttackSwitches":
        """With the memory format and the convolutions that are fast on `device` for a network in `dtype`
        (None: float32).

        others: fields as given; a `channels_last` of None is chosen, `winograd` is where it pays.
        """
        amp = next((name for name, half in AMP_DTYPES.items() if half is dtype), "off")
        last = others.pop("channels_last", None)
        if last is None:
            last = pick_channels_last(amp, device, winograd=others.get("winograd", True))
        winograd = others.pop("winograd", True) and winograd_pays(device, amp, channels_last=last)
        others.setdefault("fused_conv", device.type == "cuda")
        return cls(dtype=dtype, channels_last=last, winograd=winograd, **others)


class Notes:
    """Passes notes on and keeps them. Not the engine itself, which would hold itself by what it holds."""

    def __init__(self, say: Say) -> None:
        self.texts: list[str] = []
        self._say = say

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        self._say(text)


class AttackEngine:
    """Attacks `model`, following its weights through `refresh`.

    Attributes:
        replica: what is attacked in its place.
        switches: as given, but for what `model` cannot be run with.
        ascent: gradients and logits of it, for attacks that are no PGD (`Search`); its iterates are to be
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
        say: Say = warnings.warn,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            model: images in [0, 1] -> logits.
            example: (n, C, H, W) images on the model's device (`AttackReplica`).
            bn: batch norm during the attack, "eval", "train" or "frozen" (`set_attack_mode`).
            rescale: as in `Underflow.guard`.
            allow_no_gradient: as in `Ascent`.
            say: told, once each, what was asked for and cannot be done, and what is done instead.
            recorder: where graphs come from; None is CUDA's where the switches ask for graphs.

        Raises:
            UserError: `model` returns no logits; no gradient reaches the images, unless `allow_no_gradient`.
        """
        if not gradient_reaches(model, example) and not allow_no_gradient:
            raise NoGradient
        s = switches or AttackSwitches()
        if s.compile != "off" or s.graphs or recorder is not None:
            prepare(example.device)  # neither a compiler nor a capture can wait for a check
        self._recorder, self._note = recorder, Notes(say)
        self.replica = AttackReplica(
            model,
            example,
            bn=bn,
            dtype=s.dtype,
            channels_last=s.channels_last,
            fold=s.fold and bn == "eval",
            fused_conv=s.fused_conv,
            winograd=s.winograd,
            static=s.compile != "off" or s.graphs or recorder is not None,
            compares=self.compares,
        )
        self.switches = s = replace(s, channels_last=self.replica.channels_last)
        if self.replica.note and has_batch_norm(model):
            self._note(f"batch norm is not folded in the attack: {self.replica.note}")
        underflow = Underflow.guard(bn, s.dtype, rescale if s.closed_form or rescale else False)
        network: Any = self.replica.network
        if s.compile != "off" and bn != "eval":
            # Batch statistics cannot move inside a functional gradient, so only the network is compiled; and
            # for the sake of timings alone they must not.
            mode = "default" if s.compile == AUTO else s.compile
            network = compile_whole(network, mode=mode, what="the attacked network", say=self._note)
        if s.compile != "off" and bn == "eval":
            self.ascent: Ascent = CompiledAscent(
                network,
                underflow,
                s.dtype,
                s.closed_form,
                s.compile,
                self._note,
                allow_no_gradient=allow_no_gradient,
            )
        else:
            self.ascent = Ascent(
                network, underflow, s.dtype, s.closed_form, allow_no_gradient=allow_no_gradient
            )
        if recorder is None and s.graphs:
            self._recorder = CudaRecorder(example.device)
        self._graphed: dict[Any, GraphedCall] = {}
        self._settled: set[Any] = set()
        self._state = ReplicaState(self.replica, moves=bn == "train")
        self._planned = _path(self.replica, s, bn, example.device)

    @property
    def path(self) -> str:
        """In words, how the attack is computed, and what of it was given up so far."""
        return "; ".join([self._planned, *self._note.texts])

    def refresh(self) -> None:
        """Take over the model's weights and statistics; once per batch of training, after every change by
        others.
        """
        self.replica.refresh()

    def expect(self, x: Tensor, passes: float = math.inf) -> None:
        """Images `x` are about to be attacked by `ascent` with so many pairs of passes
        (`WinogradLayers.expect`).
        """
        x = self.to_memory_format(x)
        self.replica.expect(x, passes)
        self._settle(x)

    def logits(self, x: Tensor) -> Tensor:
        """What the attacked network answers, in the attack's precision."""
        return self.ascent.logits(x)

    def gradient(self, x: Tensor, goal: AttackGoal) -> Tensor:
        """The gradient at images `x` that a first step would follow, in the attack's precision; never
        compiled.
        """
        return self.ascent.gradient(self.ascent.to_model_input(self.to_memory_format(x)), goal)

    def run(
        self,
        x: Tensor,
        goal: AttackGoal,
        spec: PGDSpec,
        *,
        x_start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """`run_pgd` on the replica. x: (N, C, H, W), float32 or float64, in [0, 1]; the caller owns grad
        mode.
        """
        x = self.to_memory_format(x)
        x_start = None if x_start is None else self.to_memory_format(x_start)
        self.replica.expect(x, spec.steps * spec.restarts)
        self._settle(x)
        self._settle_compiled(x, goal, spec)
        if (
            self._recorder is None or generator is not None
        ):  # a graph draws from the device's default generator
            return run_pgd(self.ascent, x, goal, spec, x_start=x_start, generator=generator)
        kind, ascent = (goal.kind, spec), self.ascent
        if kind not in self._graphed:

            def whole(x: Tensor, target: Tensor, *start: Tensor) -> tuple[Tensor | None, ...]:
                x_start = start[0] if start else None
                result = run_pgd(ascent, x, replace(goal, target=target), spec, x_start=x_start)
                return result.x_adv, result.zero_grads, result.kept

            self._graphed[kind] = GraphedCall(whole, self._recorder, self._note, self._state)
        outputs = self._graphed[kind](x, goal.target, *([] if x_start is None else [x_start]))
        # Copies: the graph's own outputs are overwritten by the next attack.
        x_adv, zero_grads, kept = outputs
        kept = None if kept is None else kept.clone()
        return AttackResult(x_adv.clone(), zero_grads.clone(), x.shape[0] * spec.steps * spec.restarts, kept)

    def _settle_compiled(self, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> None:
        """Before the first attack of each kind and shape that is compiled: give compilation up where it
        weakens the attack.
        """
        seen = (goal.kind, spec.norm, tuple(x.shape), x.dtype)
        if (
            not isinstance(self.ascent, CompiledAscent)
            or seen in self._settled
            or len(self._settled) >= MAX_SIGNATURES
        ):
            return
        if (
            len(x) == 0
            or is_uncompiled()
            or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        ):
            return
        self._settled.add(seen)
        eager = self.ascent.eager()
        if why := disagreement(self.ascent, eager, x, goal, spec):
            self._note(f"the attack runs without torch.compile: when compiled, {why}")
            self.ascent = eager

    def margin_and_grad(self, x: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Soft margins of images `x` and their gradients, as `Ascent.margin_and_grad`; never compiled."""
        return self.ascent.margin_and_grad(
            self.ascent.to_model_input(self.to_memory_format(x)), labels, temperature
        )

    def boundary(
        self,
        x: Tensor,
        labels: Tensor,
        spec: BoundarySpec,
        *,
        x_start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Boundary:
        """`run_boundary` on the replica, whose batch norm must be in mode "eval"; images and start as in
        `run`.
        """
        x = self.to_memory_format(x)
        self.replica.expect(x, spec.steps)
        self._settle(x)
        starts, ascent = () if x_start is None else (self.to_memory_format(x_start),), self.ascent

        def whole(x: Tensor, labels: Tensor, *start: Tensor) -> Boundary:
            return run_boundary(
                ascent, x, labels, spec, x_start=start[0] if start else None, generator=generator
            )

        if self._recorder is None or generator is not None:
            return whole(x, labels, *starts)
        if spec not in self._graphed:
            self._graphed[spec] = GraphedCall(whole, self._recorder, self._note, self._state)
        return self._graphed[spec](x, labels, *starts).clone()

    def _settle(self, x: Tensor) -> None:
        if self.replica.settled:  # before `x` is rounded for the network, at every attack
            return
        with waits_on_purpose(), self.ascent.autocast(x):
            slower = self.replica.settle(self.ascent.to_model_input(x))
        if slower:
            self._note(
                f"{slower} convolutions of the attack are not fused with their ReLU: fusion measured slower on this GPU"
            )

    def to_memory_format(self, x: Tensor) -> Tensor:
        """`x` in the memory format of the replica."""
        return x.contiguous(
            memory_format=torch.channels_last if self.switches.channels_last else torch.contiguous_format
        )


@dataclass(frozen=True)
class Attacker:
    """An engine with the numbers of a run's attack: what a training method's inner search works with."""

    engine: AttackEngine
    spec: PGDSpec

    def __call__(
        self, x: Tensor, goal: AttackGoal, *, spec: PGDSpec | None = None, x_start: Tensor | None = None
    ) -> AttackResult:
        """`AttackEngine.run`, as the run has configured it unless told otherwise."""
        return self.engine.run(x, goal, spec or self.spec, x_start=x_start)


def _path(replica: AttackReplica, switches: AttackSwitches, bn: str, device: torch.device) -> str:
    dtype = float32_name(device) if switches.dtype is None else str(switches.dtype).removeprefix("torch.")
    unfolded = f"batch norm {bn}" if has_batch_norm(replica.network) else "no batch norm"
    parts = [
        f"{dtype} replica",
        f"{replica.num_folded} batch norms folded" if replica.num_folded else unfolded,
    ]
    parts += [f"{replica.num_fused} fused with their ReLU"] * (replica.num_fused > 0)
    parts += [f"up to {replica.num_winograd} Winograd convolutions"] * (replica.num_winograd > 0)
    parts += ["channels-last"] * switches.channels_last
    if switches.compile != "off":
        parts.append("one compiled graph" if bn == "eval" else "compiled network")
    parts += ["CUDA graph"] * switches.graphs
    return ", ".join(parts)
