"""Networks of a run: raw modules, the attacked replica, and the compiled views that a step calls."""

import torch
from torch import nn

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.copy_check import check_twin
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.followed_state import FollowedState
from fastdynat.attack_engine.network_modes import frozen_twin, trained_twin, unmoved_twin
from fastdynat.config import ModelConfig
from fastdynat.data import RELEASED_PIXELS, DatasetInfo
from fastdynat.distributed.synchronized_batch_norm import synchronize_batch_norm
from fastdynat.execution.compiling import compile_whole
from fastdynat.execution.fallbacks import Fallbacks, WarnedFallbacks
from fastdynat.methods import Network, Networks
from fastdynat.models import undivided
from fastdynat.training.activation_checkpointing import checkpoint_activations
from fastdynat.training.average import AverageRule, WeightAverage
from fastdynat.training.stored_state import StoredState


def pixel_statistics(
    model: ModelConfig, info: DatasetInfo
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation per channel that the networks normalise by; None where they do not."""
    if model.normalize == "none":
        return None, None
    own = info.mean, info.std
    return RELEASED_PIXELS.get(info.name, own) if model.normalize == "released" else own


class NetworkSet:
    """The modules of a run, under "model" and (if there is a guide, trained or frozen) "guide".

    Checkpoints, the weight average and validation use `raw`; a training step calls `views`, which may be
    compiled. Each view has a fixed mode and fixed gradient needs, so compiled code never has to change
    either.

    Attributes:
        passes: the modules through which updates pass, under the names of `raw`: those of `raw` themselves,
            or twins that compute activations again.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module | None,
        *,
        frozen_guide: bool = False,
        image_shape: tuple[int, int, int],
        device: torch.device,
        channels_last: bool = False,
        attack_bn: str = "eval",
        sync_bn: bool = False,
        attack: AttackSwitches | None = None,
        compile_mode: str = "off",
        checkpointing: bool = False,
        ema: float = 0.0,
        swa: bool = False,
        ema_buffers: str = "average",
        ema_every: str = "step",
        fallbacks: Fallbacks | None = None,
        initial: str | None = None,
    ) -> None:
        """
        Args:
            frozen_guide: the guide is not trained, and in eval mode.
            sync_bn: in train mode, batch norm of the trained networks has the statistics of the batch on all
                ranks, and of the attacked one, too, where `attack_bn` is not "eval".
            attack: settings of the attack engine.
            compile_mode: mode of torch.compile for the trained networks, or "off".
            checkpointing: the passes of updates through trained networks compute activations again
                (`checkpoint_activations`).
            ema: decay of the weight average; 0 for none, unless `swa` gives all weights the same share.
            ema_every: "step" lets `average_step` move it, "epoch" leaves that to the trainer.
            fallbacks: as in `AttackEngine`.
            initial: sha256 of the weights that the model starts from, kept as an attribute; None where they
                were drawn.
        """
        fallbacks, self.initial = fallbacks or WarnedFallbacks(), initial
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.raw: dict[str, nn.Module] = {"model": model} | ({"guide": guide} if guide is not None else {})
        for module in self.raw.values():
            module.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
        if frozen_guide and guide is not None:
            guide.eval().requires_grad_(False)
        self.ema: WeightAverage | None = None
        if ema or swa:
            rule = AverageRule(ema, equal=swa)
            self.ema = WeightAverage(model, rule, copy_buffers=ema_buffers == "copy")
        self._average_steps = ema_every == "step"
        # One object for good: validation keeps its replica as long as it sees the same network.
        self._deployed = undivided(model if self.ema is None else self.ema.module)
        # From a separate generator: building the engine draws nothing from the run's random stream.
        example = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
        example = example.to(next(model.parameters()).dtype)
        self.attack = AttackEngine(model, example, bn=attack_bn, switches=attack, fallbacks=fallbacks)
        self.compile_mode, self._fallbacks = compile_mode, fallbacks
        guide_eval = (
            None if guide is None else self._view(_frozen_guide(guide, example), "the guide in eval mode")
        )
        unmoved = unmoved_twin(model)
        trained = self._trained(frozen_guide)
        self.passes = {
            name: self._checkpointed(network, example) if checkpointing else network
            for name, network in trained.items()
        }
        if checkpointing:
            checkpoint_activations(unmoved, example)
        if sync_bn:  # only now: no check of a copy has waited for other ranks
            attacked = [] if attack_bn == "eval" else [self.attack.replica.network]
            for network in (*trained.values(), *self.passes.values(), unmoved, *attacked):
                synchronize_batch_norm(network)
        self.views = Networks(
            model=self._view(self.passes["model"], "the model"),
            attacked=self.attack.logits,
            unmoved=self._view(unmoved, "the model with frozen running statistics"),
            guide=self._view(self.passes["guide"], "the guide") if "guide" in trained else guide_eval,
            guide_eval=guide_eval,
        )
        self._followed = FollowedState(model, self.attack, example)
        self._stored = [StoredState(network, example) for network in self.raw.values()]

    def _trained(self, frozen_guide: bool) -> dict[str, nn.Module]:
        return {name: module for name, module in self.raw.items() if name == "model" or not frozen_guide}

    @staticmethod
    def _checkpointed(network: nn.Module, example: torch.Tensor) -> nn.Module:
        """A twin that forgets activations: the network itself stays as copies and checkpoints need it."""
        twin = trained_twin(network)  # whose replica has been checked
        checkpoint_activations(twin, example)
        return twin

    def _view(self, module: nn.Module, what: str) -> Network:
        return (
            module
            if self.compile_mode == "off"
            else compile_whole(module, mode=self.compile_mode, what=what, fallbacks=self._fallbacks)
        )

    def deployed(self) -> nn.Module:
        """The network to validate and save as the model: the weight average if there is one.

        It is without the division of logits that training's passes have (--logit-scale).
        """
        return self._deployed

    def check_state(self) -> None:
        """Raise UserError if the attacked replica or a checkpoint misses state of a network.

        See `FollowedState` and `StoredState`.
        """
        self._followed.check()
        for stored in self._stored:
            stored.check()

    def average_step(self) -> None:
        """Move the weight average after a step, unless that happens at the end of the epoch."""
        if self.ema is not None and self._average_steps:
            self.ema.update()


def _frozen_guide(guide: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of `guide` in eval mode. Raises NotCopyable where a copy computes something else."""
    twin = frozen_twin(guide, "eval")
    check_twin(guide, twin, example)
    return twin
