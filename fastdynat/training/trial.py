"""Trial of torch.compile: a run's own training step, timed compiled and not, before the run begins."""

import logging
from dataclasses import replace
from typing import Any, cast

import torch

import fastdynat
from fastdynat.config import to_flat
from fastdynat.data import TrainSplit
from fastdynat.data.random_images import random_split
from fastdynat.distributed import apart, world
from fastdynat.distributed.shares import deal
from fastdynat.errors import UserError
from fastdynat.execution.fallbacks import SilentFallbacks
from fastdynat.machine.racing import race
from fastdynat.ops import use_backend
from fastdynat.training.parts import build_parts
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.tuning import remembered
from fastdynat.tuning.devices import check_compile

logger = logging.getLogger(__name__)

TRIAL_STEPS = 2  # of the attack; enough to weigh its gradients against the update
# Keys of a configuration that the time of a step depends on, beside the method's options and the image size.
DECIDING = (
    *(
        "method",
        "model",
        "guide",
        "batch_size",
        "bn_momentum",
        "normalize",
        "logit_scale",
        "freeze",
        "norm",
        "attack_bn",
        "awp",
        "optimizers",
        "opt",
        "ema",
        "swa",
    ),
    *(
        "device",
        "amp",
        "kernels",
        "channels_last",
        "fold",
        "fused_conv",
        "winograd",
        "closed_form",
        "deterministic",
        "clip_grad",
    ),
)


def settle_compile(
    config: ResolvedConfig[Any], split: TrainSplit, *, announce: bool = True
) -> ResolvedConfig[Any]:
    """`config` with "off" or "default" for ``compile: auto``; `announce` logs the choice and its reason.

    On a GPU compiled code is always faster. On the CPU the run's own step, with few attack steps, is timed on
    random images of the same size, once per machine and setting, which takes as long as compiling and ten
    steps."""
    if config.engine.compile != "auto":
        return config
    asked, device = config, torch.device(config.engine.device)
    try:
        check_compile("default", device)
    except UserError:
        _log(announce, "there is no C++ compiler here (install g++); running without torch.compile")
        return _with(config, "off")
    if device.type == "cuda":
        return _with(config, "default")
    here = world()
    share = deal(config.data.batch_size, here.rank, here.size).images
    config = replace(config, data=replace(config.data, batch_size=share))
    key = {
        "what": "compile",
        "shape": list(split.info.image_shape),
        "classes": split.info.num_classes,
        **_deciding(config),
    }

    def measure() -> dict[str, float]:
        _log(announce, "timing this run's step with and without torch.compile, once on this machine")
        return _timed(config, split)

    with apart():  # only rank 0 of several processes measures
        seconds = remembered(key, device, {"off", "default"}, measure)
    gain = seconds["off"] / seconds["default"]
    mode = "default" if gain > 1 else "off"
    _log(announce, f"{mode}; a compiled step is {gain:.2f}x as fast as one without (measured)")
    return _with(asked, mode)


def _log(announce: bool, text: str) -> None:
    if announce:
        logger.info("--compile: %s", text)


def _with(config: ResolvedConfig[Any], mode: str) -> ResolvedConfig[Any]:
    return replace(config, engine=replace(config.engine, compile=cast(Any, mode)))


def _deciding(config: ResolvedConfig[Any]) -> dict[str, Any]:
    flat = to_flat(config)
    steps = {"attack_steps": min(TRIAL_STEPS, config.attack.steps)}
    options = {name: repr(value) for name, value in vars(config.options).items()}
    return (
        {name: flat[name] for name in DECIDING}
        | steps
        | {"options": options, "fastdynat": fastdynat.__version__}
    )


def _timed(config: ResolvedConfig[Any], split: TrainSplit) -> dict[str, float]:
    """Seconds of a step by compile mode, with the images of one process."""
    images = random_split(split.info, config.data.batch_size, config.engine.seed, batches=2)
    attack = replace(config.attack, steps=min(TRIAL_STEPS, config.attack.steps), early_steps=None)
    plain = replace(
        config,
        attack=attack,
        data=replace(config.data, loader="resident", labelled=None, epoch_steps=None),
        engine=replace(config.engine, check_fidelity=0, boundary_speed=0),
    )
    with torch.random.fork_rng(devices=[]), use_backend(config.engine.kernels):
        calls = {}
        for mode in ("off", "default"):
            _, step, loader = build_parts(
                _with(plain, mode), images, fallbacks=SilentFallbacks(), load_sources=False
            )
            batch = next(iter(loader.epoch(0)))
            step(batch)  # compiles
            calls[mode] = lambda step=step, batch=batch: step(batch)
        return race(calls)
