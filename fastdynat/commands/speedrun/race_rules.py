"""Rules of the race: the flags that a record may have, and the results that count."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastdynat.config import override
from fastdynat.config.train_checks import check_train_config
from fastdynat.documents import convert, short_repr
from fastdynat.errors import UserError, unknown_name
from fastdynat.methods.configs import default_config
from fastdynat.methods.options import check_options

EPS, STEP_SIZE = "8/255", "2/255"  # of the attack that counts, PGD-20 in float32 with one uniform start
TRAIN_IMAGES, TEST_IMAGES, CLASSES = 50_000, 10_000, 10
TARGETS = {"cpu-2": 0.30, "gpu-1": 0.50}  # of each track; a record may aim higher
SEEDS = 3
SAMPLE, SAMPLE_SEED = 1000, 0  # class-stratified test images under AutoAttack
LARGEST_GAP = 0.04  # of PGD-20's accuracy over AutoAttack's on the same images
CPU_CORES = 2
GPU = re.compile(r"\bH[12]00\b(?!.*\bMIG\b)")  # not a GH200, whose host is another, nor a slice of one

SET_BY_THE_RACE = (
    *("data", "data_dir", "download", "image_size", "val_size", "seed", "device"),
    *("run_dir", "overwrite", "stop_after", "tensorboard", "quiet", "save_every"),
)
# Weights or images from elsewhere would move time out of the clock; validation would choose.
NOT_ALLOWED = {
    **dict.fromkeys(("init_from", "init_sha256", "guide_from"), "everything is trained inside the clock"),
    **dict.fromkeys(("extra_data", "extra_labels"), "the training images are CIFAR-10's own"),
    **dict.fromkeys(("stop_at", "patience", "val_every"), "nothing is validated; all epochs are trained"),
    **dict.fromkeys(("check_fidelity", "boundary_speed", "on_collapse"), "nothing is validated"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """Settings of the plain loop. The attack is fixed: 10 steps of 2/255 in a ball of 8/255, uniform start.

    Attributes:
        milestones: completed epochs after which the learning rate is multiplied by `gamma`.
    """

    epochs: int
    model: str = "small"
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1


def check_record_flags(flags: Mapping[str, Any], loop: str, origin: str) -> None:
    """Raise UserError for flags that `loop` does not take or the rules do not allow; `origin` holds them."""
    if loop == "plain":
        plain_settings(flags, origin)
        return
    for key in flags:
        if key in SET_BY_THE_RACE:
            raise UserError(f"{origin}: {key} is set by the race; leave it out")
        if key in NOT_ALLOWED:
            raise UserError(f"{origin}: {key} is against the rules ({NOT_ALLOWED[key]}); leave it out")
    for key in ("method", "epochs"):
        if key not in flags:
            raise UserError(f"{origin} lacks train.{key}")
    scale = training_config(flags, {}, origin).model.logit_scale
    if scale < 1:
        raise UserError(
            f"{origin}: logit_scale {scale:g} is against the rules (below 1, it flattens the softmax, which "
            "raises PGD-20 accuracy and no robustness); give 1 or more"
        )


def training_config(flags: Mapping[str, Any], own: Mapping[str, Any], origin: str) -> Any:
    """The `TrainConfig` of a lap: `flags` of the record and the race's `own`; nothing is held out."""
    method = flags["method"]
    if not isinstance(method, str):
        raise UserError(f"{origin}: method must be a name, got {short_repr(method)}")
    config = override(default_config(method), {**flags, "val_size": 0, **own}, origin)
    try:
        check_train_config(config)
        check_options(config.options)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return config


def plain_settings(flags: Mapping[str, Any], origin: str) -> PlainSettings:
    """The settings of the plain loop in `flags`. Raises UserError for an unknown key or a wrong value."""
    known = [field.name for field in dataclasses.fields(PlainSettings)]
    for key in flags:
        if key not in known:
            raise UserError(f"{origin}: {unknown_name('key', str(key), known)} (of the plain loop)")
    found = convert(dict(flags), PlainSettings, origin=origin, why="see docs/speedrun.md")
    if min(found.epochs, found.batch_size) < 1 or found.lr <= 0:
        raise UserError(f"{origin}: epochs and batch_size must be at least 1, and lr above 0")
    return found


def broken_rules(
    track: str, target: float, laps: Sequence[Mapping[str, Any]], *, largest_gap: float = LARGEST_GAP
) -> list[str]:
    """The reasons why the finished `laps` of a record do not count, in words; empty where they do.

    largest_gap: of PGD-20's accuracy over AutoAttack's, a share.
    """
    if not laps:
        return ["no lap is finished"]
    reasons = [] if len(laps) >= SEEDS else [f"{len(laps)} of {SEEDS} seeds are finished"]
    mean = _mean_pgd20(laps)
    asked = [lap for lap in laps if lap["seed"] < SEEDS]  # others may be added, but not until the mean fits
    if target < TARGETS[track]:
        reasons.append(f"target {100 * target:g} % is below the {100 * TARGETS[track]:g} % of track {track}")
    if mean < target:
        reasons.append(f"target missed: PGD-20 {100 * mean:.2f} % on average, not {100 * target:g} %")
    elif asked and (first := _mean_pgd20(asked)) < target:
        reasons.append(
            f"target missed: PGD-20 {100 * first:.2f} % on average over seeds 0 to {SEEDS - 1}, not "
            f"{100 * target:g} %"
        )
    for what, digests in (
        ("test", {lap["test"]["sha256"] for lap in laps}),
        ("training", {lap.get("train_sha256") for lap in laps}),  # laps of earlier versions have none
    ):
        if len(digests) > 1:
            reasons.append(f"the laps do not have the same {what} images")
    for lap in laps:
        reasons += [f"seed {lap['seed']}: {reason}" for reason in _of_lap(track, lap, largest_gap)]
    return reasons


def _mean_pgd20(laps: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(lap["test"]["pgd20"]["accuracy"]) for lap in laps) / len(laps)


def _of_lap(track: str, lap: Mapping[str, Any], largest_gap: float) -> list[str]:
    found = []
    test, sample, machine = lap["test"], lap["sample"], lap["environment"]
    if sample is None:
        found.append("AutoAttack and the masking checks were left out (--quick)")
    if (test["images"], test["classes"]) != (TEST_IMAGES, CLASSES):
        found.append(f"{test['images']} test images of {test['classes']} classes are not CIFAR-10's")
    if lap["train_images"] != TRAIN_IMAGES:
        found.append(f"{lap['train_images']:,} training images are not CIFAR-10's {TRAIN_IMAGES:,}")
    if sample is not None and sample["gap"] > largest_gap:
        found.append(
            f"AutoAttack is {100 * sample['gap']:.1f} points under PGD-20 on {sample['images']} images; "
            f"{100 * largest_gap:g} are allowed"
        )
    found += [f"masking check: {check['name']}" for check in lap["masking"] or () if not check["passed"]]
    if track == "cpu-2" and machine["threads"] > CPU_CORES:
        found.append(f"{machine['threads']} threads; track cpu-2 has {CPU_CORES} cores")
    if track == "gpu-1" and not any(GPU.search(name) for name in machine["gpus"][:1]):
        found.append(f"track gpu-1 is for one whole H100 or H200, not for {machine['gpus'][:1] or 'a CPU'}")
    return found
