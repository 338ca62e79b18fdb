"""What attacks on a model run on from call to call, while others train, move and replace it."""

import warnings
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastdynat.attacks import AttackSwitches, NotCopyable
from fastdynat.compat.runner import Normalized, OnModel, OnReplica, Runner, TrainingModes, memory
from fastdynat.compiling import MODES
from fastdynat.devices import pick_half
from fastdynat.errors import UserError, unknown_name

HALF = (torch.float16, torch.bfloat16)
EVAL = TrainingModes()


class Speed(TypedDict, total=False):
    """Keyword-only arguments of every attack.

    Attributes:
        amp: True runs the network in the precision that is fast on this machine, bfloat16, float16 or, with a warning, float32;
            a dtype insists on it.
        compile: compile the step with torch.compile; a string is its mode. Also done for a model that torch.compile has made.
        channels_last: run the network in channels-last memory format; None is what is fast on this machine.
        graphs: replay the whole attack as a CUDA graph per batch shape; None is on for a GPU.
        fold: fold batch norm into the layers before it.
        winograd: Winograd's algorithm for 3x3 convolutions where it is faster, in float32 on the CPU; rounds about five times
            as coarsely.
    """

    amp: bool | torch.dtype
    compile: bool | str
    channels_last: bool | None
    graphs: bool | None
    fold: bool
    winograd: bool


class Following:
    """Gives each call a `Runner` with the model's weights and statistics of now.

    The replica is made at the first call, follows every in-place change of weights and running statistics from call to call,
    and is made anew when parameters are replaced, moved or converted. It cannot see other changes, such as of a Python number
    or a plain tensor that a module holds: call `forget` after one. What was asked for and cannot be done is warned of, once,
    and is part of `path`. Nothing here keeps the model alive.

    Attributes:
        amp: as given.
        classes: how many the model of the last call has.
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
    ) -> None:
        if isinstance(amp, torch.dtype) and amp not in HALF:
            raise UserError(f"amp must be True, False, torch.bfloat16 or torch.float16, got {amp}")
        if isinstance(compile, str) and compile not in MODES:
            raise unknown_name("compile mode", compile, MODES)
        self.amp, self._channels_last, self._graphs = amp, channels_last, graphs
        self._fold, self._winograd = fold, winograd
        self._compile = compile if isinstance(compile, str) else "default" if compile else "off"
        self._said: set[str] = set()
        self._picked: dict[torch.device, torch.dtype | None] = {}
        self.forget()

    def forget(self) -> None:
        """Let go of the replica; the next call makes it anew."""
        self._replica: OnReplica | None = None
        self._made_for: Any = None
        self._path = "not called yet"

    @property
    def path(self) -> str:
        """In words, how attacks are computed, and what was given up of it; known from the first call on."""
        return self._path if self._replica is None else self._replica.path

    def runner(
        self, model: nn.Module, x: Tensor, modes: TrainingModes = EVAL, normalization: dict[str, Tensor] | None = None
    ) -> Runner:
        """For images like `x` (N, C, H, W), in `modes`; `model` reads them normalised by "mean" and "std", (1, C, 1, 1) each.

        Raises:
            UserError: dtypes of images and model that do not go together.
        """
        dtype = self._half(model, x)
        network = unwrapped(model)
        if normalization is not None:
            network = Normalized(network, *(value.to(x.device) for value in normalization.values()))
        # Not kept: unlike a replica it holds the model.
        on_model = OnModel(network, modes, dtype)
        made_for = (memory(model), x.dtype, x.device, modes)
        if made_for != self._made_for:
            replica = self._make_replica(network, x, modes, dtype, compiled=isinstance(model, OptimizedModule))
            with torch.no_grad():
                self.classes = (replica or on_model).eval_logits(two_images(x)).shape[1]
            self._replica, self._path, self._made_for = replica, on_model.path, made_for
        elif self._replica is not None:
            self._replica.refresh()
        return self._replica or on_model

    def _half(self, model: nn.Module, x: Tensor) -> torch.dtype | None:
        """The half precision in which `model` is to be attacked at `x`; None is the images' own precision."""
        own = own_dtype(model, x)
        if own not in (x.dtype, *HALF) or (self.amp and own == torch.float64):
            raise UserError(
                f"images are {x.dtype} and the model {own}; convert one to the other's dtype (amp is for a float32 model)"
            )
        if own in HALF:
            return own
        if x.device not in self._picked:  # once: a dtype that changes between calls would be another attack
            self._picked[x.device] = pick_half(self.amp, x.device, self.warn)
        return self._picked[x.device]

    def _make_replica(
        self, network: nn.Module, x: Tensor, modes: TrainingModes, dtype: torch.dtype | None, *, compiled: bool
    ) -> OnReplica | None:
        """None: `network` is to be attacked itself."""
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
            compile="default" if compiled and self._compile == "off" else self._compile,
            graphs=gpu if self._graphs is None else self._graphs and gpu,
        )
        if self._graphs and not gpu:
            self.warn(f"graphs=True needs a CUDA device, not {x.device}: the attack runs without CUDA graphs")
        try:
            if isinstance(network, DataParallel):
                raise NotCopyable(
                    "it is spread over several GPUs by DataParallel; DistributedDataParallel has a replica on each"
                )
            return OnReplica(network, two_images(x).to(own_dtype(network, x)), switches=switches, say=self.warn)
        except NotCopyable as error:
            self.warn(f"the model is attacked itself, eagerly: {error}")
            return None

    def warn(self, text: str) -> None:
        """A warning, once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=2)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that this process computes, without what wraps it for training or for speed."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel) or (isinstance(model, DataParallel) and len(model.device_ids) < 2):
            model = model.module
        else:
            return model


def own_dtype(model: nn.Module, x: Tensor) -> torch.dtype:
    """Of `model`'s parameters; without any, that of the images."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)


def two_images(x: Tensor) -> Tensor:
    """Like `x`, but whatever a call was given, and without a draw from the caller's random stream."""
    return torch.rand(2, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
