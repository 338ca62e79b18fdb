"""The replica of a model that attacks run on, kept from call to call while the model changes."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.network_comparison import reference_logits
from fastdynat.attack_engine.network_modes import NotCopyable, attack_mode
from fastdynat.attack_engine.network_state import network_state
from fastdynat.attack_engine.zero_gradients import zero_gradient_remedy
from fastdynat.attacks import AttackResult
from fastdynat.compat.agreement import Agreement
from fastdynat.compat.arguments import GradientWatch
from fastdynat.compat.runner import Normalized, OnModel, OnReplica, Runner, TrainingModes
from fastdynat.errors import UserError, unknown_name
from fastdynat.execution.compiling import AUTO, MODES
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.models.logits import HALF, Output, check_output_choice, half_of, own_dtype, with_output
from fastdynat.tuning.devices import pick_half

EVAL = TrainingModes()
MOST_IN_A_ROW = 3  # calls that each find the model changed: making a replica costs more than it saves


class Once:
    """Issues each warning once. A separate object, because a replica keeps a reference to it."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=3)


class _FallbacksWarnedOnce(Fallbacks):
    """Fallbacks of replicas that follow each other: each text is warned of once."""

    def __init__(self, once: Once) -> None:
        super().__init__()
        self._once = once

    def report(self, text: str) -> None:
        self._once(text)


class ReplicaCache:
    """Gives each call a `Runner` with the model's current weights and statistics.

    The first call makes the replica, and each call copies in-place changes of tensors to it. Any other
    visible change leads to a new replica: a tensor replaced, moved or converted; a changed Python number,
    function or hook; a changed global that the network's code names (`network_state`). Every call compares
    the replica's logits with the model's (`Agreement`) and makes a new replica if they differ. If that does
    not help, or if the model changes at every call, attacks run on the model itself from then on. Options
    that cannot be used are named in one warning each and in `path`. The cache does not keep the model alive.
    Threads take turns.

    Attributes:
        amp: as given.
        classes: number of classes of the last call's model.
    """

    def __init__(
        self,
        *,
        amp: bool | torch.dtype = False,
        compile: bool | str = False,
        channels_last: bool | None = None,
        graphs: bool | None = None,
        fold: bool = True,
        winograd: bool = True,
        output: Output | None = None,
        rescale: bool | None = None,
    ) -> None:
        if output is not None:
            check_output_choice(output)
        if isinstance(amp, torch.dtype) and amp not in HALF:
            raise UserError(f"amp must be True, False, torch.bfloat16 or torch.float16, got {amp}")
        if isinstance(compile, str) and compile not in (AUTO, *MODES):
            raise unknown_name("compile mode", compile, (AUTO, *MODES))
        self.amp, self._channels_last, self._graphs = amp, channels_last, graphs
        self._fold, self._winograd = fold, winograd
        self.output, self._rescale = output, rescale
        self._compile = compile if isinstance(compile, str) else AUTO if compile else "off"
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        """The options alone, for copies in this or another process: a copy makes a new replica."""
        asked = ("amp", "_channels_last", "_graphs", "_fold", "_winograd", "output", "_rescale", "_compile")
        return {name: getattr(self, name) for name in asked}

    def __setstate__(self, asked: dict[str, Any]) -> None:
        vars(self).update(asked)
        self._begin()

    def _begin(self) -> None:
        self._picked: dict[torch.device, torch.dtype | None] = {}
        self.warn = Once()
        self._watch = GradientWatch(self.warn)
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Drop the replica; the next call makes a new one."""
        with self._lock:
            self._replica: OnReplica | None = None
            self._made_for: Any = None
            self._in_a_row, self._given_up = 0, False
            self._agrees = Agreement()
            self._path = "not called yet"
            self._dtype: torch.dtype | None = None

    @property
    def path(self) -> str:
        """The attack's execution in words, with the modes given up; known from the first call on."""
        return self._path if self._replica is None else self._replica.path

    def runner(
        self,
        model: nn.Module,
        x: Tensor,
        modes: TrainingModes = EVAL,
        normalization: dict[str, Tensor] | None = None,
    ) -> Runner:
        """The runner for images like `x` (N, C, H, W), in `modes`.

        Args:
            normalization: "mean" and "std", (1, C, 1, 1) each, of the images that `model` takes.

        Raises:
            UserError: dtypes of images and model that do not go together.
        """
        dtype = self._dtype = self._half(model, x)
        network = unwrapped(model)
        if normalization is not None:
            network = Normalized(network, *(value.to(x.device) for value in normalization.values()))
        network = with_output(network, self.output)
        _make_lazy_weights(network, x)
        # Not kept: unlike a replica it holds the model.
        on_model = OnModel(network, modes, dtype, self._rescale)
        compiled = isinstance(model, OptimizedModule)

        def make() -> OnReplica | None:
            return self._make_replica(network, self._example(on_model, x), x, modes, dtype, compiled=compiled)

        with self._lock:
            made_for = (network_state(unwrapped(model)).marks, modes, x.dtype, x.device, dtype, compiled)
            self._follow(made_for, on_model, make, x)
            if self._replica is not None and not self._agrees(on_model, self._replica, x):
                self._remake(on_model, make, x)
            return self._replica or on_model

    def _follow(
        self, made_for: Any, on_model: OnModel, make: Callable[[], OnReplica | None], x: Tensor
    ) -> None:
        """Bring the replica up to date with the visible changes of the model."""
        if made_for == self._made_for:
            self._in_a_row = 0
            if self._replica is not None:
                self._replica.refresh()
            return
        self._in_a_row += self._made_for is not None and made_for[1:] == self._made_for[1:]
        if self._in_a_row > MOST_IN_A_ROW and not self._given_up:
            self._give_up("more than the model's weights changes from call to call")
        self._replica, self._path = None if self._given_up else make(), on_model.path
        self._made_for = made_for
        self.classes = reference_logits(on_model.eval_logits, self._example(on_model, x)).shape[1]

    def _remake(self, on_model: OnModel, make: Callable[[], OnReplica | None], x: Tensor) -> None:
        """Replace a replica whose logits differ from the model's after a change that cannot be seen."""
        self._replica, self._agrees = make(), Agreement()
        if self._replica is not None and not self._agrees(on_model, self._replica, x):
            self._give_up("the model's logits differ from the replica's")
        if self._replica is None:
            self._path = on_model.path

    def _give_up(self, why: str) -> None:
        self._replica, self._given_up = None, True
        self.warn(f"the attack runs on the model itself, eagerly: {why}")

    def _example(self, on_model: OnModel, x: Tensor) -> Tensor:
        """Two example images, or `x` where the network takes no other batch size."""
        example = two_images(x)
        try:
            reference_logits(on_model.eval_logits, example)
        except (RuntimeError, ValueError):  # a UserError about the output is one too, and comes up again
            return x
        return example

    def _half(self, model: nn.Module, x: Tensor) -> torch.dtype | None:
        """The half precision of the attack; None is the images' own precision."""
        own = half_of(model, x.dtype)
        if self.amp and x.dtype == torch.float64:
            raise UserError(f"amp is for float32, images and model are {x.dtype}; leave it out")
        if own is not None:
            return own
        if x.device not in self._picked:  # once: a dtype that changes between calls would be another attack
            choice = pick_half(self.amp, x.device)
            if choice.note:
                self.warn(choice.note)
            self._picked[x.device] = choice.dtype
        return self._picked[x.device]

    def _make_replica(
        self,
        network: nn.Module,
        example: Tensor,
        x: Tensor,
        modes: TrainingModes,
        dtype: torch.dtype | None,
        *,
        compiled: bool,
    ) -> OnReplica | None:
        """A new replica; None where `network` itself is to be attacked."""
        if modes.model:
            if self._compile != "off" or self._graphs:
                self.warn("compile and graphs are off while the model is attacked in train mode")
            return None
        gpu = x.device.type == "cuda"
        switches = AttackSwitches.fastest(
            x.device,
            dtype,
            channels_last=self._channels_last,
            fold=self._fold,
            winograd=self._winograd,
            compile=AUTO if compiled and self._compile == "off" else self._compile,
            graphs=gpu if self._graphs is None else self._graphs and gpu,
        )
        if self._graphs and not gpu:
            self.warn(f"graphs=True needs a CUDA device, not {x.device}: the attack runs without CUDA graphs")
        try:
            if any(isinstance(module, DataParallel) for module in network.modules()):
                raise NotCopyable(
                    "DataParallel spreads the model over several GPUs; DistributedDataParallel has a replica "
                    "on each"
                )
            example = example.to(own_dtype(network) or x.dtype)
            fallbacks = _FallbacksWarnedOnce(self.warn)
            replica = OnReplica(
                network, example, switches=switches, rescale=self._rescale, fallbacks=fallbacks
            )
            if self._channels_last and not replica.switches.channels_last:
                self.warn(
                    "channels_last=True: the model fails in that memory format, so it is attacked in the "
                    "contiguous one"
                )
            return replica
        except NotCopyable as error:
            self.warn(f"the attack runs on the model itself, eagerly: {error}")
            return None

    def watch(self, result: AttackResult, modes: TrainingModes = EVAL) -> None:
        """Warn once if an attack in `modes` met images without a gradient."""
        dtype, rescale = (
            (None, bool(self._rescale)) if self._dtype is None else (self._dtype, self._rescale is not False)
        )
        self._watch(result, zero_gradient_remedy(dtype, rescale, exact=not modes.model))


def _make_lazy_weights(network: nn.Module, x: Tensor) -> None:
    """Let lazy layers take their shapes from the images, as the network's first call would."""
    if any(is_lazy(t) for t in (*network.parameters(), *network.buffers())):
        with torch.no_grad(), attack_mode(network, "eval"):
            network(x)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile's and the parallel wrappers."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel) or (
            isinstance(model, DataParallel) and len(model.device_ids) < 2
        ):
            model = model.module
        else:
            return model


def two_images(x: Tensor) -> Tensor:
    """Two images like `x`, equal in every call, that leave the caller's random stream alone."""
    return torch.rand(2, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
