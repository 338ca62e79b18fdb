"""The networks of a run: raw modules, the attack's replica, and the compiled views that a step calls."""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdynat.attacks import AttackEngine, AttackSwitches, frozen_twin
from fastdynat.compiling import compile_whole
from fastdynat.methods import Networks


class NetworkSet:
    """Owns the trained modules, keyed "model" and (with a guide) "guide".

    Checkpoints, averages and validation use `raw`; a training step uses `views`, which may be compiled. Each view is a callable
    of its own with fixed mode and gradient needs, so compiled code is never asked to change either.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module | None,
        *,
        image_shape: tuple[int, int, int],
        device: torch.device,
        channels_last: bool = False,
        attack_bn: str = "eval",
        attack: AttackSwitches | None = None,
        compile_mode: str = "off",
        ema: float = 0.0,
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        """`attack`: how the attack is computed; `compile_mode`: of what is trained; `say`: as in `AttackEngine`."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.raw: dict[str, nn.Module] = {"model": model} | ({"guide": guide} if guide is not None else {})
        for module in self.raw.values():
            module.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
        # Not from the run's random stream: building the engine draws nothing from it.
        example = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
        example = example.to(next(model.parameters()).dtype)
        self.attack = AttackEngine(model, example, bn=attack_bn, switches=attack, say=say)
        self.compile_mode = compile_mode

        def view(module: nn.Module, what: str) -> Callable[[torch.Tensor], torch.Tensor]:
            return module if compile_mode == "off" else compile_whole(module, mode=compile_mode, what=what, say=say)

        self.views = Networks(
            model=view(model, "the model"),
            attacked=self.attack.logits,
            guide=None if guide is None else view(guide, "the guide"),
            guide_eval=None if guide is None else view(frozen_twin(guide, "eval"), "the guide in eval mode"),
        )

    def deployed(self) -> nn.Module:
        """The network to validate and hand over: the weight average if there is one."""
        return self.raw["model"] if self.ema is None else self.ema.module

    def average(self) -> None:
        """Move the weight average by one step."""
        if self.ema is not None:
            self.ema.update_parameters(self.raw["model"])
