"""From what the user wrote to what is run: fills every "auto", applies the unit rule, refuses what cannot
work.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import (
    AttackConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    Switch,
    TrainConfig,
)
from fastdynat.config.rules import WARMUP, check_config
from fastdynat.data import DatasetInfo, TrainSplit, check_dali, choose_loader, default_workers
from fastdynat.errors import UserError
from fastdynat.methods import AttackDefaults, Method, method_class
from fastdynat.models import convolutions, split_style
from fastdynat.runs import guide_weights, read_sidecar
from fastdynat.training.resolve_cycle import resolved_cycle
from fastdynat.training.schedules import RELEASE_WARMUP, epochs_of_method
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
from fastdynat.units import describe, parse_size

Say = Callable[[str], None]
# TRADES, LBGAT and DYNAT train at 0.031 and are evaluated at 8/255.
PUBLISHED_EPS, PUBLISHED_STEP, EVAL_EPS = 0.031, 0.007, 8 / 255
LINF_EPS = {"digits": 0.1, "mnist": 0.3}
L2_EPS = {"digits": 1.0, "mnist": 2.0}
# The embedded digits are a thirtieth of the usual data. Measured for DYNAT (one seed, validation PGD-10):
# 85.4 % as here, 77.1 % at batch 128, 86.8 % at lr 0.1, which is the same within the 144 images' error.
EPOCHS, BATCH_SIZE, LR = ({"digits": 15}, 100), ({"digits": 64}, 128), ({"digits": 0.03}, 0.1)


def resolve(
    config: TrainConfig[Any], info: DatasetInfo, say: Say, *, carried_on: bool = False
) -> TrainConfig[Any]:
    """`config` with every automatic value filled in for the dataset `info` and the method.

    `say` is told what the unit rule read, which radii are used, and which precision is fast here.
    carried_on: `config` is of a run that another machine may have begun, so that nothing is measured anew.

    Raises:
        UserError: a value that cannot work, by name and remedy.
    """
    check_config(config)
    method = method_class(config.method)(config.options)
    config = replace(
        config,
        method=method.name,
        data=_data(config.data, info, method, say),
        model=_model(config.model, info, method),
        attack=_attack(config.attack, info, method, say),
        optim=_optim(config, info),
    )
    run = _run(config, method)  # refused before anything is measured
    engine = _engine(config, method, say, functools.partial(_work, config, info), carried_on=carried_on)
    return replace(config, engine=engine, run=run)


def resolve_loader(config: TrainConfig[Any], split: TrainSplit, say: Say) -> TrainConfig[Any]:
    """The resolved `config` with the loader for the images of `split`, which `say` is told with the
    reason.
    """
    data = config.data
    name, why = data.loader, "as asked"
    if name == "auto":
        name, why = choose_loader(split, torch.device(config.engine.device))  # type: ignore[assignment]
    workers = default_workers() if data.workers is None and name != "resident" else data.workers
    what = {"dali": f", {workers} thread(s)", "torch": f", {workers} worker process(es)"}.get(name, "")
    say(f"loader {name}{what}: {why}")
    return replace(config, data=replace(data, loader=name, workers=workers))


def check_sizes(config: TrainConfig[Any], split: TrainSplit) -> None:
    """Raise UserError where more images are asked for than the training data has. For new runs: a stored one
    goes on.
    """
    data = config.data
    held_out = len(split.val)
    for name in ("train_size", "labelled"):
        asked = getattr(data, name)
        if asked is not None and asked > len(split.train):
            raise UserError(
                f"{name} {asked}: {data.data} has {len(split.train)} training images beside the {held_out} held out for "
                "validation; ask for fewer, or leave it out for all"
            )


def say_first_epoch(config: TrainConfig[Any], say: Say) -> None:
    """Say where the release's schedule is nothing but its first epoch, which has a fifth of the rate."""
    lr, epochs = config.optim.lr, epochs_of_method(config.optim)
    assert lr is not None
    if config.optim.schedule == "release" and epochs == 1:
        say(
            f"the one epoch trains at lr/5 = {lr * RELEASE_WARMUP:g}: so does the first epoch of --schedule release, the DYNAT "
            f"code's; --schedule constant trains at {lr:g}"
        )


def _automatic(value: Any, table: tuple[dict[str, Any], Any], info: DatasetInfo) -> Any:
    return table[0].get(info.name, table[1]) if value is None else value


def _data(data: DataConfig, info: DatasetInfo, method: Method[Any], say: Say) -> DataConfig:
    data = replace(data, batch_size=_automatic(data.batch_size, BATCH_SIZE, info))
    if data.labelled is not None and not method.semi_supervised:
        raise UserError(
            f"labelled {data.labelled}: method {method.name} needs every label; leave it out, or use --method vat"
        )
    if data.loader == "dali":
        check_dali()
    data = replace(data, augment=cast(Any, info.augment) if data.augment == "auto" else data.augment)
    if data.pad_mode != "zeros" and "crop" not in data.augment:
        say(f"pad_mode {data.pad_mode} does nothing: augmentation {data.augment} takes no crops")
    return data


def _model(model: ModelConfig, info: DatasetInfo, method: Method[Any]) -> ModelConfig:
    name = ("small" if info.name == "digits" else "resnet18") if model.model == "auto" else model.model
    if not method.uses_guide:
        if model.guide_from is not None:
            raise UserError(
                f"--guide-from {model.guide_from}: method {method.name} has no guide; leave it out"
            )
        if model.guide not in ("auto", "none"):
            raise UserError(f"--guide {model.guide}: method {method.name} has no guide; leave it out")
        return replace(model, model=name, guide="none")
    if model.guide_from is None:
        if "guide" not in method.trains:
            raise UserError(
                f"method {method.name} learns from a guide that is trained already: name its run with --guide-from RUN "
                f"(one is made by: fastdynat train --method {method.guide_made_by} --run-dir RUN)"
            )
        guide = (
            ("small" if split_style(name)[0] == "small" else "resnet18_s1122")
            if model.guide == "auto"
            else model.guide
        )
        return replace(model, model=name, guide=guide)
    path = Path(model.guide_from).absolute()
    guide = read_sidecar(guide_weights(path))[0].architecture if model.guide == "auto" else model.guide
    return replace(model, model=name, guide=guide, guide_from=str(path))


def _attack(attack: AttackConfig, info: DatasetInfo, method: Method[Any], say: Say) -> AttackConfig:
    limit = 1.0 if attack.norm == "linf" else math.sqrt(math.prod(info.image_shape))

    def size(what: str, value: float | str, automatic: float) -> float:
        if value == "auto":
            return automatic
        parsed = parse_size(value, what, norm=attack.norm, limit=limit)
        if parsed.notice:
            say(parsed.notice)
        return parsed.value

    table, common = (LINF_EPS, PUBLISHED_EPS) if attack.norm == "linf" else (L2_EPS, 0.5)
    eps = size("eps", attack.eps, table.get(info.name, common))
    published, ours = attack.norm == "linf" and eps == PUBLISHED_EPS, method.attack_defaults
    usual = (
        PUBLISHED_STEP
        if published and ours.step_ratio == AttackDefaults().step_ratio
        else ours.step_ratio * eps
    )
    step_size = size("step_size", attack.step_size, usual)
    eval_eps = size("eval_eps", attack.eval_eps, EVAL_EPS if published else eps)
    steps = ours.steps if attack.steps is None else attack.steps
    if attack.early_steps is not None and not 0 <= attack.early_steps <= steps:
        raise UserError(f"early_steps must be between 0 and steps ({steps}), got {attack.early_steps}")
    start = ours.start if attack.start == "auto" else attack.start
    for count in (steps, steps if attack.early_steps is None else attack.early_steps):
        method.check_attack(PGDSpec(eps, step_size, count, norm=attack.norm, start=start), attack.attack_bn)
    if attack.awp > 0 and not method.searches:
        raise UserError(
            f"awp {attack.awp:g}: method {method.name} has no attack at the weights of now to go with; use --awp 0"
        )
    filled: Any = replace(attack, eps=eps, step_size=step_size, steps=steps, eval_eps=eval_eps, start=start)  # type: ignore[arg-type]
    say(f"{_announced(filled, method)}; evaluated at eps {describe(eval_eps)}")
    usual_values = {"steps": (None, ours.steps), "step_size": ("auto", usual), "start": ("auto", ours.start)}
    for name in method.unused_attack:
        default = usual_values.get(name, (getattr(AttackConfig(), name),))
        if getattr(attack, name) not in default:
            say(f"{name} {getattr(attack, name)} has no effect: {_search(method)}")
    return filled


def _search(method: Method[Any]) -> str:
    return f"method {method.name} " + (
        "has a search of its own" if method.attacks else "attacks nothing in training"
    )


def _announced(attack: AttackConfig, method: Method[Any]) -> str:
    """What training attacks with, in one line."""
    if not method.attacks:
        return f"no attack in training ({attack.norm})"
    used = f"{attack.norm} eps {describe(float(attack.eps))}, "
    if "steps" in method.unused_attack:
        return f"{used}{_search(method)}"
    if "step_size" in method.unused_attack:
        used += f"{attack.steps} iterations of a search of its own"
    else:
        used += f"{attack.steps} steps of {describe(float(attack.step_size))}"
    if attack.early_steps is not None:
        used += f" ({attack.early_steps} in the first {100 * attack.early_share:g} % of the epochs)"
    return used


def _optim(config: TrainConfig[Any], info: DatasetInfo) -> OptimConfig:
    optim = config.optim
    optim = replace(optim, epochs=_automatic(optim.epochs, EPOCHS, info), lr=_automatic(optim.lr, LR, info))
    assert optim.epochs is not None
    assert optim.lr is not None
    if not 0 <= optim.burn_in < optim.epochs:
        raise UserError(
            f"burn_in must be a number of epochs below --epochs ({optim.epochs}), got {optim.burn_in}"
        )
    if optim.burn_in > 0 and config.data.labelled is not None:
        raise UserError(
            f"burn_in {optim.burn_in}: natural training needs every label; leave --labelled out, or --burn-in"
        )
    optim = resolved_cycle(optim)
    return replace(optim, warmup=WARMUP.get(optim.schedule) if optim.warmup is None else optim.warmup)


def _work(config: TrainConfig[Any], info: DatasetInfo) -> Workload:
    """The convolutions of a step, with all but the engine resolved."""
    layers = convolutions(config.model.model, num_classes=info.num_classes, image_shape=info.image_shape)
    assert config.data.batch_size is not None
    return Workload.of(layers, config.data.batch_size, config.attack.steps or 0)


def _engine(
    config: TrainConfig[Any],
    method: Method[Any],
    say: Say,
    in_hand: Callable[[], Workload],
    *,
    carried_on: bool = False,
) -> EngineConfig:
    engine = config.engine
    device = pick_device(engine.device)
    _check_engine(config, method, device)
    check_kernels(engine.kernels, device)
    gpu = device.type == "cuda"
    direct = engine.winograd == "off" or not method.searches  # the update has no Winograd convolutions
    work = ANY if gpu or carried_on else in_hand()
    amp = pick_amp(engine.amp, device, say, winograd=not direct, work=work)
    if engine.winograd == "on":
        check_winograd(device, amp)
    last, winograd = engine.channels_last, engine.winograd
    if last == "auto":
        last = "on" if pick_channels_last(amp, device, winograd=not direct, work=work) else "off"
    if (
        winograd == "auto"
        and not carried_on
        and not gpu
        and not winograd_pays(device, amp, channels_last=last == "on", work=work)
    ):
        winograd = "off"
    return replace(
        engine,
        device=str(device),
        amp=cast(Any, amp),
        channels_last=last,
        winograd=winograd,
        fold=_switch(engine.fold, config.attack.attack_bn == "eval"),
    )


def _check_engine(config: TrainConfig[Any], method: Method[Any], device: torch.device) -> None:
    """Raise UserError for every combination that can be refused before operators are verified and
    convolutions timed.
    """
    engine = config.engine
    check_compile(engine.compile, device)
    if engine.boundary_speed > 0 and (config.attack.norm != "linf" or config.optim.momentum == 0):
        raise UserError(
            "--boundary-speed measures L-inf margins along SGD's momentum: use --norm linf and momentum above 0"
        )
    # Graphs and streams stay as they were asked for: a run may go on on another device.
    for name in ("graphs", "guide_stream", "fused_conv"):
        if getattr(engine, name) == "on" and device.type != "cuda":
            raise UserError(f"--{name.replace('_', '-')} on needs a CUDA device, got {device}; leave it out")
    if engine.guide_stream == "on" and not method.uses_guide:
        raise UserError(f"--guide-stream on: method {method.name} has no guide; leave it out")
    if engine.fold == "on" and config.attack.attack_bn != "eval":
        raise UserError(
            f"--fold on needs --attack-bn eval, got {config.attack.attack_bn}: batch statistics cannot be folded"
        )
    if engine.fused_conv == "on" and (engine.fold == "off" or config.attack.attack_bn != "eval"):
        raise UserError(
            "--fused-conv on needs batch norm folded into the convolutions: leave out --fused-conv or --fold off"
        )


def adopted(asked: EngineConfig, stored: EngineConfig) -> EngineConfig:
    """`asked` with what it leaves to the machine as the run settled it whose resolved configuration is
    `stored`.
    """
    left = {
        name for name in ("compile", "channels_last", "fold", "winograd") if getattr(asked, name) == "auto"
    }
    left |= {"amp"} if asked.amp in ("auto", "default") else set()
    return replace(asked, **{name: getattr(stored, name) for name in left})


def _switch(value: Switch, automatic: bool) -> Switch:
    return ("on" if automatic else "off") if value == "auto" else value


def use_fused_conv(engine: EngineConfig) -> bool:
    """Whether a resolved configuration asks for cuDNN's convolutions with bias, residual and ReLU in the
    attack.
    """
    return _switch(engine.fused_conv, engine.device.startswith("cuda") and engine.fold == "on") == "on"


def use_graphs(engine: EngineConfig) -> bool:
    """Whether a resolved configuration captures CUDA graphs: wherever it can, unless it says otherwise."""
    return _switch(engine.graphs, engine.device.startswith("cuda")) == "on"


def use_guide_stream(engine: EngineConfig, method: Method[Any]) -> bool:
    """Whether a resolved configuration runs the guide on a CUDA stream of its own."""
    return _switch(engine.guide_stream, engine.device.startswith("cuda") and method.uses_guide) == "on"


def _run(config: TrainConfig[Any], method: Method[Any]) -> Any:
    run = config.run
    if run.on_collapse == "stop" and not method.logs_adv_acc:
        raise UserError(
            f"on_collapse stop: method {method.name} logs no accuracy on attacked training images; leave it out"
        )
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the extra: pip install 'fastdynat[tensorboard]'")
    return run
