"""The engine settings that are compared with the requested one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fastdynat.config import TrainConfig
from fastdynat.data import DatasetInfo, TrainSplit
from fastdynat.errors import UserError
from fastdynat.execution.float32 import float32_name
from fastdynat.machine.capability import half_types
from fastdynat.methods import method_class, method_label
from fastdynat.models import build_model
from fastdynat.ops import selected_backend
from fastdynat.training.activation_checkpointing import blocks_of
from fastdynat.training.resolve import resolve, resolve_loader
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.trial import settle_compile
from fastdynat.tuning.devices import check_compile

Kind = Literal["attack", "step", "matmul"]


@dataclass(frozen=True)
class Switch:
    """A flag of the engine with the two values that are compared.

    Attributes:
        group: of the configuration, "engine" or "data".
        values: off and on.
        kinds: the rows in which it shows.
        gpu: needs a CUDA device.
    """

    name: str
    group: str
    values: tuple[Any, Any]
    kinds: tuple[Kind, ...]
    gpu: bool = False

    def value(self, config: TrainConfig[Any]) -> Any:
        return getattr(getattr(config, self.group), self.name)

    def turned(self, config: TrainConfig[Any]) -> TrainConfig[Any]:
        """`config` with this switch the other way."""
        off, on = self.values
        part = replace(getattr(config, self.group), **{self.name: on if self.value(config) == off else off})
        return replace(config, **{self.group: part})


BOTH: tuple[Kind, ...] = ("attack", "step")
SWITCHES = (
    Switch("amp", "engine", ("off", "bf16"), BOTH),
    Switch("channels_last", "engine", ("off", "on"), BOTH),
    Switch("compile", "engine", ("off", "default"), BOTH),
    Switch("fold", "engine", ("off", "on"), ("attack",)),
    Switch("fused_conv", "engine", ("off", "auto"), BOTH, gpu=True),
    Switch("winograd", "engine", ("off", "auto"), ("attack",)),
    Switch("closed_form", "engine", (False, True), ("attack",)),
    Switch("kernels", "engine", ("eager", "auto"), ("attack",)),
    Switch("graphs", "engine", ("off", "on"), BOTH, gpu=True),
    Switch("guide_stream", "engine", ("off", "on"), ("step",), gpu=True),
    Switch("grad_checkpointing", "engine", (False, True), ("step",)),
    Switch("loader", "data", ("torch", "resident"), ("step",)),
)


def resolved_setting(
    asked: TrainConfig[Any], split: TrainSplit, *, announce: bool = False
) -> ResolvedConfig[Any]:
    """`resolve` and `resolve_loader`, and what a run leaves to its device, the graphs and the guide's stream,
    as on or off.
    """
    config = resolve(asked, split.info, announce=announce)
    config = resolve_loader(config, split, announce=announce)
    config = settle_compile(config, split, announce=announce)
    engine, method = config.engine, method_class(config.method)(config.options)
    settled_engine = replace(
        engine,
        fused_conv=engine.fused_conv if engine.uses_fused_conv else "off",
        graphs="on" if engine.uses_graphs else "off",
        guide_stream="on" if engine.uses_guide_stream(method) else "off",
    )
    return replace(config, engine=settled_engine)


def why_not_turned(switch: Switch, config: TrainConfig[Any], info: DatasetInfo) -> str | None:
    """The reason why `switch` cannot be turned the other way in the resolved `config`; None where it can."""
    device = torch.device(config.engine.device)
    if switch.gpu and device.type != "cuda":
        return "needs a CUDA device"
    if switch.name == "winograd" and (device.type != "cpu" or config.engine.amp != "off"):
        return "is for float32 on the CPU"
    if switch.name == "fold" and config.attack.attack_bn != "eval":
        return f"needs --attack-bn eval, got {config.attack.attack_bn}"
    if switch.name == "fused_conv" and config.engine.fold != "on":
        return "needs batch norm folded"
    if switch.name == "guide_stream" and config.model.guide == "none":
        return f"{method_label(config.method)} has no guide"
    if switch.name == "kernels" and selected_backend(device.type, "auto") == "eager":
        return "no implementation but eager here"
    if switch.name == "amp" and config.engine.amp == "off" and (lacking := half_types(device)["bf16"]):
        return lacking
    if switch.name == "grad_checkpointing" and not config.engine.grad_checkpointing:
        name = config.model.model
        network = build_model(name, num_classes=info.num_classes, image_shape=info.image_shape)
        return None if blocks_of(network) else f"{name} has no blocks"
    if switch.name == "compile" and config.engine.compile == "off":
        try:
            check_compile("default", device)
        except UserError as error:
            return str(error)
    return None


def precision_name(config: TrainConfig[Any]) -> str:
    """The precision of a resolved configuration: "bf16", "fp16", "fp32", or "fp32 (TF32 convolutions)" as the
    flags are now.
    """
    engine = config.engine
    return float32_name(torch.device(engine.device), "fp32") if engine.amp == "off" else engine.amp


def label(config: TrainConfig[Any]) -> str:
    """The setting in a few words: precision, and whether it is compiled."""
    amp = precision_name(config)
    return amp if config.engine.compile == "off" else f"{amp} compiled"


def grid(
    asked: TrainConfig[Any], settle: Callable[[TrainConfig[Any]], ResolvedConfig[Any]]
) -> list[ResolvedConfig[Any]]:
    """`asked` in float32 and in its own precision, without and with torch.compile, as a user would get each;
    itself last.

    settle: resolves a configuration, so that what is "auto" follows the precision.
    """
    engine, full = asked.engine, settle(asked)
    amps = dict.fromkeys(("off", full.engine.amp))
    modes = dict.fromkeys(("off", engine.compile))
    return [
        settle(replace(asked, engine=replace(engine, amp=amp, compile=mode)))
        for amp in amps
        for mode in modes
    ]


def switch_values(config: TrainConfig[Any]) -> dict[str, Any]:
    """The switches of a row as plain values."""
    return {s.name: s.value(config) for s in SWITCHES}
