"""The configuration of `fastdynat compare`: methods, seeds, budget, and that of each method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdynat.commands.figures import check_picture
from fastdynat.config import TrainConfig, check_seed, override, read_config_file, to_flat
from fastdynat.config.value_ranges import check_values
from fastdynat.documents import parse_yaml
from fastdynat.errors import UserError, unknown_name
from fastdynat.methods import METHODS, method_class, method_label, method_name, options_type
from fastdynat.runs import check_results

# Keys of a run that a comparison decides itself, and how it is told.
OWN = {
    "method": "use --methods",
    "run_dir": "use --out",
    "overwrite": "choose a new --out instead",
    "stop_after": "every run trains to its end; Ctrl-C pauses",
}
# Without these alike, a table would compare something else than methods.
SAME = (
    *("data", "data_dir", "image_size", "train_size", "val_size", "drop_last", "model", "normalize"),
    "logit_scale",
    *("extra_data", "extra_share", "extra_labels"),
    *("norm", "eval_eps", "epochs", "epoch_steps", "device", "deterministic", "seed", "stop_at"),
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The compared methods, seeds and attacks, and the outputs."""

    methods: str = "natural,madry,dynat"
    """Comma-separated training methods, each a name or path/to/file.py:CLASS."""
    seeds: str | None = None
    """Comma-separated seeds; every method is trained once per seed. None is --seed."""
    budget_seconds: float | None = None
    """Train every method for this many seconds instead of --epochs: the time per epoch is measured first, and
    the schedule gets as many epochs as fit (at least 1). Compilation counts towards the budget, validation
    does not."""
    settings: Annotated[
        tuple[str, ...], tyro.conf.arg(name="set", metavar="METHOD.KEY=VALUE"), tyro.conf.UseAppendAction
    ] = ()
    """An option of one method, or a training flag for it alone: --set dynat.beta=0.5 --set
    natural.lr=0.05."""
    attacks: str = "clean,pgd20,cw"
    """Attacks on the test set, as in fastdynat eval."""
    out: str | None = None
    """Folder of the comparison, one run directory for each method and seed; None is a new one under runs/.
    Given the folder of a stopped comparison and the same other flags, the comparison continues."""
    json: str | None = None
    """Also write the results to this file."""
    chart: str | None = None
    """Draw robust validation accuracy over training time into this .svg, .png or .pdf (extra `plots`)."""


@dataclass(frozen=True)
class NoOptions:
    """The options that all methods share: none."""


def shared_config(path: Path | None) -> TrainConfig[NoOptions]:
    """The defaults of the training flags that all methods share, with the keys of the YAML file at `path` put
    in.

    Raises:
        UserError: the file cannot be read, or has a key that is not shared.
    """
    values = {} if path is None else read_config_file(path)
    for key in values:
        if key in OWN:
            raise UserError(f"{path}: a comparison has no {key}: {OWN[key]}")
        owner = next((name for name in METHODS if key in (f.name for f in fields(options_type(name)))), None)
        if owner is not None:
            raise UserError(f"{path}: {key} is an option of {owner}: use --set {owner}.{key}={values[key]}")
    return override(TrainConfig(method="", options=NoOptions()), values, str(path))


def check_compare(config: CompareConfig) -> None:
    """Raise UserError for a value that cannot work; nothing is written."""
    check_values(config)
    from fastdynat.commands.evaluate.columns import parse_columns  # needs torch, which the flags do not

    columns = parse_columns(config.attacks, eps=0.1, step_size=0.1, norm="linf", amp="off")
    if transfers := [column.name for column in columns if column.transfer]:
        raise UserError(
            f"a comparison has no --source for {transfers[0]}: run fastdynat eval on its runs afterwards"
        )
    check_picture("chart", config.chart)
    ledger = None if config.out is None else Path(config.out, "ledger.json")
    check_results((config.json,), (config.chart,), inputs=(ledger,))


def parse_names(text: str) -> dict[str, str]:
    """The methods in a comma-separated list, each as a configuration names it, by the word that tables have.

    Raises:
        UserError: none, an unknown one (the nearest are suggested), or one twice.
    """
    names = [method_name(name.strip()) for name in text.split(",") if name.strip()]
    labels = [method_label(name) for name in names]
    if not labels or len(set(labels)) < len(labels):
        raise UserError(f"--methods must name one method or more, each once, got {text!r}")
    return dict(zip(labels, names, strict=True))


def parse_seeds(text: str | None, default: int) -> list[int]:
    """The seeds in a comma-separated list, or `default`.

    Raises:
        UserError: none, something else than a seed, or one twice.
    """
    try:
        seeds = [default] if text is None else [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different whole numbers such as 1,2,3, got {text!r}")
    for seed in seeds:
        check_seed(seed)
    return seeds


def parse_settings(settings: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keys and values by method from ``METHOD.KEY=VALUE``; values are read as YAML.

    Raises:
        UserError: another form, a method that is not compared, or a key that the comparison decides.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for text in settings:
        where, equals, value = text.partition("=")
        method, dot, key = where.strip().partition(".")
        key = key.replace("-", "_")
        if not (equals and dot and key):
            raise UserError(f"--set takes METHOD.KEY=VALUE, such as dynat.beta=0.5, got {text!r}")
        if method not in found:
            raise unknown_name("method of --set (known are those in --methods)", method, found)
        if key in OWN or key == "seed":
            raise UserError(f"--set {where}: {OWN.get(key, 'use --seeds')}")
        if key in found[method]:
            raise UserError(f"--set {where} is given twice")
        found[method][key] = parse_yaml(value, origin=f"--set {where}")
    return found


def method_configs(shared: TrainConfig[NoOptions], config: CompareConfig) -> dict[str, TrainConfig[Any]]:
    """The unresolved configuration of each method: `shared` with its own options and --set.

    Raises:
        UserError: names, keys or values that cannot work, or that would make the methods differ in one of
            `SAME`.
    """
    names = parse_names(config.methods)
    own = parse_settings(config.settings, list(names))
    # A run can be resumed and evaluated from elsewhere.
    data = replace(shared.data, data_dir=str(Path(shared.data.data_dir).absolute()))
    configs = {}
    for label, name in names.items():
        plain: TrainConfig[Any] = replace(shared, method=name, options=options_type(name)(), data=data)
        if shared.model.guide not in ("auto", "none") and not method_class(name).uses_guide:
            plain = replace(
                plain, model=replace(shared.model, guide="auto")
            )  # --guide is for the methods that have one
        configs[label] = override(plain, own[label], f"--set {label}")
    for label, one in configs.items():
        if one.attack.norms is not None:
            raise UserError(
                f"{label}: --norms {one.attack.norms}: a comparison measures one norm; train the methods one "
                "by one and run fastdynat eval on their runs"
            )
    check_same(configs, SAME)
    if config.budget_seconds is not None and any(c.optim.epochs is not None for c in configs.values()):
        raise UserError("--budget-seconds decides the number of epochs; leave --epochs out")
    return configs


def check_same(configs: Mapping[str, TrainConfig[Any]], keys: Sequence[str]) -> None:
    """Raise UserError where two methods differ in one of `keys`."""
    (first, reference), *others = ((name, to_flat(config)) for name, config in configs.items())
    for name, flat in others:
        for key in keys:
            if flat[key] != reference[key]:
                raise UserError(
                    f"{key} is {reference[key]} for {first} and {flat[key]} for {name}: a comparison needs "
                    f"one value; give --{key.replace('_', '-')} for all of them"
                )
