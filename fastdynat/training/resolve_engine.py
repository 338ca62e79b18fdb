"""Engine of a `ResolvedConfig`: device, precision, memory format and switches for this machine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastdynat.config import EngineConfig
from fastdynat.config.optimizer_kinds import SGD_KIND
from fastdynat.errors import UserError
from fastdynat.methods import Method
from fastdynat.ops import use_backend
from fastdynat.training.resolved_config import (
    ResolvedAttack,
    ResolvedEngine,
    ResolvedOptim,
    filled_in,
    switched_on,
)
from fastdynat.tuning import ANY, Workload
from fastdynat.tuning.devices import (
    check_compile,
    check_kernels,
    check_winograd,
    pick_amp,
    pick_channels_last,
    pick_device,
    winograd_pays,
)


def resolved_engine(
    engine: EngineConfig,
    attack: ResolvedAttack,
    optim: ResolvedOptim,
    method: Method[Any],
    notes: list[str],
    workload: Callable[[], Workload] | None,
) -> ResolvedEngine:
    """`engine` for the device that it names; `notes` gets which precision is fast here.

    workload: counts the convolutions of a step, for choices that are timed on the CPU; None times nothing.

    Raises:
        UserError: a device that is not there, or switches that exclude each other.
    """
    device = pick_device(engine.device)
    check_switches(engine, attack, optim, method, device)
    check_kernels(engine.kernels, device)
    gpu = device.type == "cuda"
    direct = engine.winograd == "off" or not method.searches  # the update has no Winograd convolutions
    work = ANY if gpu or workload is None else workload()
    with use_backend(engine.kernels):
        amp, note = pick_amp(engine.amp, device, winograd=not direct, work=work)
        notes += [note] if note else []
        if engine.winograd == "on":
            check_winograd(device, amp)
        last, winograd = engine.channels_last, engine.winograd
        if last == "auto":
            last = "on" if pick_channels_last(amp, device, winograd=not direct, work=work) else "off"
        timed = winograd == "auto" and workload is not None and not gpu
        if timed and not winograd_pays(device, amp, channels_last=last == "on", work=work):
            winograd = "off"
    fold = switched_on(engine.fold, attack.attack_bn == "eval")
    return filled_in(
        ResolvedEngine,
        engine,
        device=str(device),
        amp=amp,
        channels_last=last,
        winograd=winograd,
        fold="on" if fold else "off",
    )


def check_switches(
    engine: EngineConfig,
    attack: ResolvedAttack,
    optim: ResolvedOptim,
    method: Method[Any],
    device: torch.device,
) -> None:
    """Refuse combinations that cannot work before operators are verified and convolutions timed."""
    check_compile(engine.compile, device)
    momentum = optim.opt == SGD_KIND and optim.momentum > 0
    if engine.boundary_speed > 0 and (attack.norm != "linf" or not momentum):
        raise UserError(
            "--boundary-speed measures L-inf margins along SGD's momentum: "
            "use --norm linf, --opt sgd and momentum above 0"
        )
    # Graphs and streams are stored as configured: the run may be resumed on another device.
    for name in ("graphs", "guide_stream", "fused_conv"):
        if getattr(engine, name) == "on" and device.type != "cuda":
            raise UserError(f"--{name.replace('_', '-')} on needs a CUDA device, got {device}; leave it out")
    if engine.graphs == "on" and optim.zero1:
        raise UserError("--graphs on: the update of --zero1 cannot be captured; leave one of them out")
    if engine.boundary_speed > 0 and optim.zero1:
        raise UserError(
            "--boundary-speed needs the momentum of every weight, but --zero1 keeps only a part in each "
            "process: leave one of them out"
        )
    if engine.guide_stream == "on" and not method.uses_guide:
        raise UserError(f"--guide-stream on: method {method.name} has no guide; leave it out")
    if engine.fold == "on" and attack.attack_bn != "eval":
        raise UserError(
            f"--fold on needs --attack-bn eval, got {attack.attack_bn}: batch statistics cannot be folded"
        )
    if engine.fused_conv == "on" and (engine.fold == "off" or attack.attack_bn != "eval"):
        raise UserError(
            "--fused-conv on needs batch norm folded into the convolutions: "
            "leave out --fused-conv or --fold off"
        )
    if engine.fused_conv == "on" and engine.deterministic:
        raise UserError(
            "--fused-conv on: cuDNN's fused kernels are not deterministic; "
            "leave out --fused-conv or --deterministic"
        )


def with_stored_choices(asked: EngineConfig, stored: EngineConfig) -> EngineConfig:
    """`asked` with its automatic values replaced by those of the resolved configuration `stored`."""
    names = [
        name for name in ("compile", "channels_last", "fold", "winograd") if getattr(asked, name) == "auto"
    ]
    names += ["amp"] * (asked.amp in ("auto", "default"))
    return replace(asked, **{name: getattr(stored, name) for name in names})
