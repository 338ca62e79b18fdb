"""All runs of a comparison, checked before the first one starts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastdynat.commands.compare.compare_config import (
    SAME,
    CompareConfig,
    NoOptions,
    check_compare,
    check_same,
    method_configs,
    parse_seeds,
)
from fastdynat.commands.compare.epoch_cost import probe
from fastdynat.commands.compare.ledger import Ledger
from fastdynat.commands.evaluate.columns import check_target_classes, parse_columns
from fastdynat.commands.evaluate.targets import TestSets
from fastdynat.config import TrainConfig, to_flat
from fastdynat.data import DatasetInfo, TrainSplit, dataset_info, load_test
from fastdynat.data.sources import ReadOnceSplit
from fastdynat.errors import UserError
from fastdynat.execution.fallbacks import SilentFallbacks
from fastdynat.methods.configs import stored_config
from fastdynat.runs import check_new, claim_name, free_name, looks_like_run
from fastdynat.training import build_parts, open_split
from fastdynat.training.own_code import data_folder_name
from fastdynat.training.resolve import resolve, resolve_loader
from fastdynat.training.resolve_engine import with_stored_choices
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.training_state import fixed_settings
from fastdynat.training.trial import settle_compile

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=TrainConfig[Any])
Configs = Mapping[str, TrainConfig[Any]]  # by method
ResolvedConfigs = dict[str, ResolvedConfig[Any]]


@dataclass(frozen=True)
class RunPlan:
    """One run. `asked` is what `fastdynat train` would be given, `config` what comes of it."""

    method: str
    seed: int
    asked: TrainConfig[Any]
    config: ResolvedConfig[Any]
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class ComparisonPlan:
    """The runs of a comparison and what they share.

    Attributes:
        tests: the test set, read, as `evaluation.measure_runs` takes it.
        images: number of training images.
    """

    out: Path
    runs: tuple[RunPlan, ...]
    ledger: Ledger
    tests: TestSets
    images: int


def make_plan(shared: TrainConfig[NoOptions], compare: CompareConfig) -> ComparisonPlan:
    """Check everything and, with a budget, measure the methods that have not been measured yet. Nothing is
    written but, at the end, an empty folder where the comparison chooses its own.

    Raises:
        UserError: anything that cannot work in any of the runs, or a flag that was another when the
            comparison was begun.
    """
    check_compare(compare)
    seeds = parse_seeds(compare.seeds, shared.engine.seed)
    configs = method_configs(replace(shared, engine=replace(shared.engine, seed=seeds[0])), compare)
    stem = f"compare-{data_folder_name(shared.data.data)}"
    out = Path(compare.out) if compare.out else free_name(stem)
    ledger = Ledger(out, compare.budget_seconds)  # refuses a folder of something else
    if not compare.out:
        check_new(out, overwrite=False)
    known = dataset_info(shared.data.data)
    if known is not None:
        # Refuse before the data is read, where that is possible.
        _check_attacks(compare, _resolve_all(configs, known), known)
    opened = open_split(next(iter(configs.values())))
    split = ReadOnceSplit.of(opened)
    for name, config in configs.items():
        if config.data.labelled is not None or config.extra.extra_data is not None:
            with _naming(name):
                open_split(config)
    resolved = {
        name: resolve_loader(c, split, announce=False)
        for name, c in _resolve_all(configs, split.info).items()
    }
    _check_attacks(compare, resolved, split.info)
    resolved = {name: settle_compile(c, split) for name, c in resolved.items()}
    tests = _test_set(next(iter(resolved.values())))
    runs = _runs(configs, resolved, seeds, out, ledger)
    if compare.out:
        for run in runs:
            _check_place(run)
    for name in dict.fromkeys(run.method for run in runs if not ledger.has_ended(run.path)):
        _try(name, resolved[name], split, ledger)
    if not compare.out:
        # Only now, when nothing can be refused any more. Another comparison may have begun under the name
        # meanwhile.
        out = claim_name(stem)
        ledger.move(out)
    return ComparisonPlan(out, _runs(configs, resolved, seeds, out, ledger), ledger, tests, len(split.train))


@contextmanager
def _naming(method: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        hint = (
            f" (in a comparison: --set {method}.guide_from=RUN)" if "--guide-from RUN" in str(error) else ""
        )
        raise UserError(f"{method}: {error}{hint}") from None


def _resolve_all(configs: Configs, info: DatasetInfo) -> ResolvedConfigs:
    resolved = {}
    for name, config in configs.items():
        with _naming(name):
            resolved[name] = resolve(config, info, announce=False)
    check_same(resolved, SAME)
    return resolved


def _check_attacks(compare: CompareConfig, resolved: ResolvedConfigs, info: DatasetInfo) -> None:
    """Raise UserError for an attack that is not defined for the methods' threat models or the classes."""
    for config in resolved.values():
        attack = config.attack
        columns = parse_columns(
            compare.attacks, eps=attack.eval_eps, step_size=attack.step_size, norm=attack.norm, amp="off"
        )
        check_target_classes(columns, info.num_classes)


def _test_set(config: TrainConfig[Any]) -> TestSets:
    data = config.data
    test = load_test(data.data, data.data_dir, image_size=data.image_size, download=data.download)
    return {(data.data, data.data_dir, data.image_size): test}


def _runs(
    asked: Configs, resolved: ResolvedConfigs, seeds: Sequence[int], out: Path, ledger: Ledger
) -> tuple[RunPlan, ...]:
    """Seed after seed, so that a comparison that is stopped has compared all methods under the first ones."""
    runs = []
    for seed in seeds:
        for name in asked:
            path, epochs = out / f"{name}-seed{seed}", ledger.epochs(name)
            first = _placed(asked[name], path, seed, epochs)
            full = _placed(resolved[name], path, seed, epochs)
            runs.append(RunPlan(name, seed, first, full, path))
    return tuple(runs)


def _placed(config: ConfigT, path: Path, seed: int, epochs: int | None) -> ConfigT:
    """`config` in the folder `path`, with a seed, and the budget's number of epochs (None: unchanged)."""
    return replace(
        config,
        optim=replace(config.optim, epochs=config.optim.epochs if epochs is None else epochs),
        engine=replace(config.engine, seed=seed),
        run=replace(config.run, run_dir=str(path)),
    )


def _check_place(run: RunPlan) -> None:
    """Raise UserError where `run` cannot be in its folder, or is there with other flags."""
    if not looks_like_run(run.path):
        check_new(run.path, overwrite=False)
        return
    stored = stored_config(run.path)
    engine = with_stored_choices(run.asked.engine, stored.engine)
    before, now = to_flat(stored), to_flat(run.config) | vars(engine)
    for key in (*fixed_settings(run.config), "epochs", "stop_at", "patience", "on_collapse"):
        if before.get(key) != now[key]:
            raise UserError(
                f"{run.path} was begun with {key} {before.get(key)}, not {now[key]}; keep it, or choose a "
                "new --out"
            )


def _try(name: str, config: ResolvedConfig[Any], split: TrainSplit, ledger: Ledger) -> None:
    """Build everything once; with a budget, measure how many epochs fit."""
    with _naming(name):
        if ledger.budget is None:
            build_parts(config, split, fallbacks=SilentFallbacks())
        elif name not in ledger.probes:
            found = ledger.probes[name] = probe(config, split, ledger.budget)
            takes, budget = found["expected_seconds"], ledger.budget
            logger.info(
                "%s: %.3g s for an epoch, %d in %.3g of %g s",
                name,
                found["first_epoch_seconds"],
                found["epochs"],
                takes,
                budget,
            )
