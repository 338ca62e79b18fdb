"""Choices of precision, memory format and convolution algorithm, each with its reason in one clause."""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdynat.machine import Clock, OtherLoad, free_cores, half_types, one_thread, processor, race
from fastdynat.tuning import measurements
from fastdynat.tuning.workload import (
    ANY,
    TINY,
    ConvolutionSetting,
    Layer,
    Workload,
    convolution_settings,
    passes,
    update_call,
)

# The safer alternative (float32, then direct convolutions, then channels-last, which oneDNN's strided input
# gradients need) wins unless another one is faster by this fraction: timings repeat to a few percent.
MARGIN = 0.03
SECONDS = 1.0  # of all settings together, once per machine
QUIET = 0.05  # fraction of the cores' time that other processes may take during a timing on all threads
_known: dict[str, dict[str, float]] = {}  # timings of this process, by key


@dataclass(frozen=True)
class Choice:
    """The fastest settings on a device.

    Attributes:
        amp: "off", "bf16" or "fp16".
        channels_last: memory format of images and convolution weights.
        winograd: Winograd's algorithm is faster for float32 convolutions.
        why: the reason for the precision, in a clause.
    """

    amp: str
    channels_last: bool
    winograd: bool
    why: str


def choose(
    device: torch.device,
    *,
    amps: Collection[str] = ("off", "bf16", "fp16"),
    channels_last: bool | None = None,
    winograd: bool = True,
    work: Workload = ANY,
    clock: Clock | None = None,
) -> Choice:
    """The fastest setting on `device` among those whose precision is in `amps`.

    On a GPU it follows from the device. On the CPU precisions without instructions are excluded and the
    others timed, once per machine, number of threads, version of torch and shapes of `work` (`measurements`).

    channels_last: the memory format, if it is fixed; None to choose it.
    winograd: whether Winograd's algorithm may be used.
    work: the convolutions to time.
    """
    lacking = half_types(device)
    fast = faster_types(device)
    types = [name for name in fast if name in amps]
    if device.type == "cuda":
        return _on_gpu(types, lacking, device)
    timed = _timed(device, fast, clock, work)
    allowed = [
        s
        for s in convolution_settings(types)
        if (s.amp in amps or s.amp in types) and (winograd or not s.winograd)
    ]
    allowed = [s for s in allowed if channels_last in (None, s.channels_last)]
    if not allowed:  # half precision without instructions, as the caller insists: oneDNN emulates it
        return Choice(next(iter(amps)), True, False, lacking[next(iter(amps))])
    best = _best(allowed, timed)
    return Choice(best.amp, best.channels_last, best.winograd, _reason(best, allowed, timed, lacking, amps))


def _on_gpu(types: list[str], lacking: Mapping[str, str], device: torch.device) -> Choice:
    if not types:
        return Choice("off", True, False, "; ".join(dict.fromkeys(lacking.values())) or "as asked")
    return Choice(
        types[0], True, False, f"{types[0]} has tensor cores on {torch.cuda.get_device_name(device)}"
    )


def _surest_first(setting: ConvolutionSetting) -> tuple[Any, ...]:
    return setting.amp != "off", setting.amp, setting.winograd, not setting.channels_last


def _best(allowed: list[ConvolutionSetting], timed: Mapping[str, float]) -> ConvolutionSetting:
    best, *others = sorted(allowed, key=_surest_first)
    for setting in others:
        if timed[setting.name] < timed[best.name] * (1 - MARGIN):
            best = setting
    return best


def _reason(
    best: ConvolutionSetting,
    allowed: list[ConvolutionSetting],
    timed: Mapping[str, float],
    lacking: Mapping[str, str],
    amps: Collection[str],
) -> str:
    wanted = [name for name in ("bf16", "fp16") if name in amps]
    full = [timed[s.name] for s in allowed if s.amp == "off"]
    half = {s.amp: min(timed[o.name] for o in allowed if o.amp == s.amp) for s in allowed if s.amp != "off"}
    if not wanted or not full:
        return "as asked"
    if best.amp != "off":
        return f"{best.amp} is {min(full) / half[best.amp]:.2g}x as fast as float32 here (measured)"
    measured = [f"{name} measured {min(full) / t:.2g}x as fast as float32 here" for name, t in half.items()]
    return "; ".join(measured or [f"{lacking[wanted[0]]} and is emulated, many times slower than float32"])


def _timed(
    device: torch.device, types: list[str], clock: Clock | None, work: Workload = ANY
) -> dict[str, float]:
    """Seconds per image of every setting on the CPU, by name: known, stored, or measured now."""
    return _remembered("convolutions", device, convolution_settings(types), clock, work)


def slower_than_float32(amp: str, device: torch.device, clock: Clock | None = None) -> float:
    """The time of convolutions in "bf16" or "fp16" on the CPU, as a multiple of float32's.

    A dtype without instructions is timed on a single small layer.
    """
    fast = faster_types(device)
    if amp in fast:
        timed = _timed(device, fast, clock)
    else:
        pair = [ConvolutionSetting("off", True), ConvolutionSetting(amp, True)]
        timed = _remembered(f"{amp} emulated", device, pair, clock, TINY)
    best = {
        name: min(t for setting, t in timed.items() if setting.startswith(name)) for name in ("float32", amp)
    }
    return best[amp] / best["float32"]


def _remembered(
    what: str, device: torch.device, wanted: list[ConvolutionSetting], clock: Clock | None, work: Workload
) -> dict[str, float]:
    trained = work.passes if math.isfinite(work.passes) else None
    shapes = [
        [*vars(layer).values(), layer.timed_images(work.batch), *_winograd(layer, work)]
        for layer in work.layers
    ]

    def alone() -> dict[str, float]:
        with one_thread():
            return _race_layers(wanted, work, clock)

    names = {setting.name for setting in wanted}
    key = {"what": f"{what} on one thread", "settings": sorted(names), "layers": shapes, "passes": trained}
    if torch.get_num_threads() == 1:
        return remembered(key, device, names, alone)
    # Memory formats scale differently with threads: ResNet-18 at batch 8 is faster channels-last on one
    # thread and contiguous on two. Under other load only a single thread can be timed, by its own CPU time.
    key_of_all = key | {"what": f"{what} on all threads"}
    try:
        return remembered(key_of_all, device, names, lambda: _undisturbed(wanted, work, clock))
    except _DisturbedError:
        found = remembered(key, device, names, alone)
        _known[_text(key_of_all, device)] = found  # not timed again in this process
        return found


class _DisturbedError(Exception):
    """Other processes used the CPU during a timing on all threads."""


def _undisturbed(wanted: list[ConvolutionSetting], work: Workload, clock: Clock | None) -> dict[str, float]:
    """Run `_race_layers` on all threads; raise if other processes used the CPU meanwhile."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if free_cores() < threads:
        raise _DisturbedError
    load = OtherLoad()
    found = _race_layers(wanted, work, clock)
    if (load.share() or 0.0) > QUIET + max(0, cores - threads) / cores:
        raise _DisturbedError
    return found


def _winograd(layer: Layer, work: Workload) -> list[float | None]:
    """By memory format, the factor of Winograd's time for the full batch; None where it is not used for
    `layer`."""
    layouts = (False, True)
    return [layer.scale(work.batch, o) if layer.repays(work.batch, work.passes, o) else None for o in layouts]


def _race_layers(wanted: list[ConvolutionSetting], work: Workload, clock: Clock | None) -> dict[str, float]:
    """Seconds per image of all layers of `work`: a forward and backward pass, and its share of an update."""
    total = dict.fromkeys((setting.name for setting in wanted), 0.0)
    for layer in work.layers:
        images, scales = layer.timed_images(work.batch), _winograd(layer, work)
        tried = [s for s in wanted if not s.winograd or scales[s.channels_last] is not None]
        calls = {s.name: passes(s, layer, images) for s in tried}
        least = race(calls, seconds=SECONDS / len(work.layers), clock=clock)
        trained = _race_updates(wanted, work, layer, clock)
        for setting in wanted:
            scale = (scales[setting.channels_last] if setting.winograd else None) or 1.0
            took = scale * least.get(setting.name, least[setting.direct.name]) + trained[setting.direct.name]
            total[setting.name] += took * layer.count / images
    return total


def _race_updates(
    wanted: list[ConvolutionSetting], work: Workload, layer: Layer, clock: Clock | None
) -> dict[str, float]:
    """Seconds that the update adds to each pair of passes, without Winograd's algorithm; 0 without training.

    Weight gradients prefer other memory formats: with 512 channels on 4x4 maps they take three times as long
    in channels-last."""
    direct = [setting for setting in wanted if not setting.winograd]
    if not math.isfinite(work.passes):
        return {setting.name: 0.0 for setting in direct}
    calls = {setting.name: update_call(setting, layer, layer.timed_images(work.batch)) for setting in direct}
    least = race(calls, seconds=SECONDS / len(work.layers) / 2, clock=clock)
    return {name: seconds / max(work.passes, 1.0) for name, seconds in least.items()}


def remembered(
    key: Mapping[str, Any], device: torch.device, names: set[str], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Seconds of `names` under `key` on this machine: those known already, here or in `measurements`, or
    from `measure`.
    """
    text = _text(key, device)
    if text not in _known:
        key = json.loads(text)
        seconds = measurements.load_seconds(key, names)
        if seconds is None:
            seconds = measure()
            measurements.save_seconds(key, seconds)
        _known[text] = seconds
    return _known[text]


def _text(key: Mapping[str, Any], device: torch.device) -> str:
    return json.dumps({"measured": dict(key), "processor": processor(device)}, sort_keys=True)


def faster_types(device: torch.device) -> list[str]:
    """The half-precision dtypes, "bf16" or "fp16", that `device` has instructions for."""
    return [name for name, why_not in half_types(device).items() if not why_not]


def choice_table(device: torch.device) -> list[tuple[str, float | None, str]]:
    """The basis of the choices on `device`: (setting, seconds or None if not timed, remark)."""
    lacking = half_types(device)
    if device.type == "cuda":
        return [
            (name, None, why_not or "has tensor cores: known, not measured")
            for name, why_not in lacking.items()
        ]
    timed = _timed(device, faster_types(device), None)
    best = min(timed.values())
    rows: list[tuple[str, float | None, str]] = [
        (name, t, f"{t / best:.2f}x the best") for name, t in timed.items()
    ]
    for name, why_not in lacking.items():
        if why_not:
            factor = slower_than_float32(name, device)
            rows.append((name, None, f"{why_not}: {factor:.2g}x slower than float32 on a small layer"))
    return rows
