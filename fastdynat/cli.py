"""The command line: flags -> configuration -> run; nothing else."""

import argparse
import dataclasses
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastdynat import __version__, doctor
from fastdynat.benchmark import BenchConfig, run_bench
from fastdynat.compare import CompareConfig, run_compare, shared_config
from fastdynat.config import (
    AttackConfig,
    AutoAmp,
    CompileMode,
    DataConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Switch,
    TrainConfig,
    read_yaml,
    update,
)
from fastdynat.engine import Diverged, Trainer, default_config, new_run, resumed_run, stored_config
from fastdynat.engine.progress import error_console
from fastdynat.engine.stopping import StopRequest
from fastdynat.errors import UserError, unknown_name
from fastdynat.evaluation import EvalConfig, evaluate_runs
from fastdynat.evaluation.columns import KNOWN
from fastdynat.export import ExportConfig, export_run
from fastdynat.methods import method_class
from fastdynat.ops import selected_backend
from fastdynat.pictures import check_picture
from fastdynat.recipes import read_recipe, recipe_names
from fastdynat.report import ReportConfig, run_report
from fastdynat.runs import LAST, check_writable, require_run

OptionsT = TypeVar("OptionsT")

USAGE = f"""fastdynat {__version__}: fast dynamic-label adversarial training

usage: fastdynat COMMAND [FLAGS]      fastdynat COMMAND --help lists the flags

  train    train a model (default: DYNAT on the embedded digits); --resume RUN goes on
  eval     accuracy of one or more runs under attacks
  compare  several training methods on the same data, budget and seeds
  export   a run's network for RobustBench, torch.export or ONNX
  report   runs as one HTML page with pictures
  boundary picture of margins and the boundary's speed, of a run with --boundary-speed
  recipes  the published protocols that train --recipe NAME follows
  bench    how fast attack and training step are on this machine
  doctor   what this machine can use, and why not
"""

# Spellings of the scripts that people come from.
ALIASES = {
    "--epsilon": "--eps",
    "--attack-eps": "--eps",
    "--num-steps": "--steps",
    "--attack-iters": "--steps",
    "--attack-steps": "--steps",
    "--alpha": "--step-size",
    "--pgd-alpha": "--step-size",
    "--attack-step": "--step-size",
    "--arch": "--model",
    "--wd": "--weight-decay",
    "--lr-max": "--lr",
    "--lr-schedule": "--schedule",
    "--out": "--run-dir",
}
# Flags with a value that may stand bare.
BARE = {
    "--amp": ("bf16", get_args(AutoAmp)),
    "--compile": ("default", get_args(CompileMode)),
    "--channels-last": ("on", get_args(Switch)),
    "--fold": ("on", get_args(Switch)),
    "--winograd": ("on", get_args(Switch)),
    "--graphs": ("on", get_args(Switch)),
}


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Generic[OptionsT]):
    """Train a network. Every flag is also a key of a --config file (underscores for dashes)."""

    recipe: str | None = None
    """Published protocol to start from: `fastdynat recipes` lists them; --config and flags given here win."""
    config: str | None = None
    """YAML file of flags; flags given here win."""
    resume: str | None = None
    """Go on with the run in this directory, exactly as if it had never stopped."""
    train: TrainConfig[OptionsT]


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Accuracy of the best and last checkpoints of runs, and of other models, under attacks."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories, or robustbench:NAME, torchvision:NAME, timm:NAME, module:callable (with --data)."""
    list_attacks: bool = False
    """Print the names that --attacks takes."""
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Hand RUN's network over as a file, which is read again and compared with the network before it is kept."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    export: ExportConfig


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """RUNs as one HTML page: accuracies, curves, attacked images, saliency, transfer (extra `plots`).

    A second call only draws."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)


@dataclass(frozen=True, kw_only=True)
class BoundaryCommand:
    """Draw the margins of RUN's validation images and how fast the boundary moved; the run needs --boundary-speed."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    chart: str = "speed.svg"
    """Picture to write: .svg, .png or .pdf (extra `plots`)."""


@dataclass(frozen=True, kw_only=True)
class BenchCommand(Generic[OptionsT]):
    """Time the attack and the training step of a setting; the training flags say which."""

    bench: BenchConfig = dataclasses.field(default_factory=BenchConfig)
    method: str = "dynat"
    """Training method, one of those that train takes, unless it has a search of its own."""
    options: OptionsT
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(data="cifar10"))
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Train several methods on the same data, model, budget and seeds, evaluate them, and compare. The training flags are for
    all of them; --set is for one."""

    config: str | None = None
    """YAML file of training flags; flags given here win."""
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    data: DataConfig
    model: ModelConfig
    attack: AttackConfig
    optim: OptimConfig
    engine: EngineConfig
    run: LogConfig


@dataclass(frozen=True, kw_only=True)
class RecipesCommand:
    """The published protocols that `fastdynat train --recipe NAME` follows; each one's source is in its file."""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """What this machine can use: torch, CUDA, Triton, the extension, DALI, torch.compile; and why not."""

    json: bool = False
    """Print JSON instead of a table."""
    try_compile: bool = False
    """Also compile a tiny function with torch.compile (takes a while the first time)."""


FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def normalize(argv: Sequence[str], own: Collection[str] = ()) -> list[str]:
    """Replace other scripts' spellings, but for flags that are the command's `own`, and give bare flags their value.

    >>> normalize(["--epsilon=8", "--amp", "--epochs", "3"])
    ['--eps=8', '--amp', 'bf16', '--epochs', '3']
    """
    out: list[str] = []
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        out.append((flag if flag in own else ALIASES.get(flag, flag)) + equals + value)
        if flag in BARE and not equals:
            default, values = BARE[flag]
            if argv[i + 1 : i + 2] == [] or argv[i + 1] not in values:
                out.append(default)
    return out


def _own_flags(options_type: type) -> set[str]:
    return {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(options_type)}


def _early(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that decide which defaults and which method's options the full parser has."""
    parser = argparse.ArgumentParser(prog="fastdynat train", add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--method", "--recipe", "--config", "--resume"):
        parser.add_argument(flag)
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def _defaults(early: argparse.Namespace) -> TrainConfig[Any]:
    if early.resume is not None:
        if early.config is not None or early.recipe is not None:
            raise UserError("--resume takes its configuration from the run; leave --config and --recipe out")
        stored = stored_config(Path(early.resume))
        if early.method is not None and method_class(early.method).name != stored.method:
            raise UserError(f"{early.resume} trains by {stored.method}, not by {early.method}; start a new run for that")
        return replace(stored, run=replace(stored.run, stop_after=None, run_dir=early.resume, overwrite=False))
    recipe = {} if early.recipe is None else read_recipe(early.recipe)[0]
    values = {} if early.config is None else read_yaml(Path(early.config))
    method = early.method or values.get("method") or recipe.get("method") or "dynat"
    if not isinstance(method, str):
        raise UserError(f"{early.config}: method must be a name, got {method!r}")
    if recipe and method_class(method).name != recipe["method"]:
        raise UserError(f"recipe {early.recipe} is for method {recipe['method']}, not {method}; leave one of them out")
    config = update(default_config(method), recipe, f"recipe {early.recipe}")
    return update(config, {**values, "method": method}, early.config or "defaults")


def _train(argv: list[str]) -> int:
    early = _early(argv)
    defaults = _defaults(early)
    options_type = method_class(defaults.method).options_type
    argv = normalize(argv, _own_flags(options_type))
    # The options type is known only now: tyro reads it from the subscripted class, type checkers cannot.
    command_type: Any = TrainCommand.__class_getitem__(options_type)  # type: ignore[attr-defined]
    default = TrainCommand(recipe=early.recipe, config=early.config, resume=early.resume, train=defaults)
    command = tyro.cli(command_type, args=argv, default=default, prog="fastdynat train", config=FLAT)
    config: TrainConfig[Any] = command.train
    if early.resume is not None and (config.run.run_dir != early.resume or config.run.overwrite):
        raise UserError("--resume names the run directory; leave --run-dir and --overwrite out")
    console = error_console()

    def say(text: str) -> None:
        console.print(text, markup=False)

    begun = resumed_run(Path(early.resume), config, say) if early.resume is not None else new_run(config, say)
    with begun as trainer:
        return _fit(trainer, say)


def _fit(trainer: Trainer, say: Any) -> int:
    path, c = trainer.run.path, trainer.config
    guide = f" with guide {c.model.guide}" if c.model.guide != "none" else ""
    say(f"{c.method}: {c.model.model}{guide} on {c.data.data}, {trainer.loader.num_images} images, {c.engine.device}")
    say(f"run directory {path}, operators: {selected_backend(torch.device(c.engine.device).type)}")
    say(f"attack: {trainer.networks.attack.path}; step: {trainer.step.path}")
    try:
        outcome = trainer.fit()
    except Diverged as error:
        kept = f"the last checkpoint in {path} is from before" if (path / LAST).exists() else "there is no checkpoint yet"
        say(f"training diverged: {error}; {kept}. Lower --lr, or --clip-grad 1")
        return 1
    if outcome.finished:
        if why := trainer.watch.ended():
            say(f"ended after {trainer.epoch} epochs: {why}")
        say(f"done: {path}; next: fastdynat eval {path}")
        return 0
    done = f"{trainer.epoch} epochs and {trainer.epoch_step} steps"
    say(f"stopped and saved after {done}; go on with: fastdynat train --resume {path}")
    return 0 if outcome.signal is None else 128 + outcome.signal


def _eval(argv: list[str]) -> int:
    command = tyro.cli(EvalCommand, args=normalize(argv), prog="fastdynat eval", config=FLAT)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if command.list_attacks:
        table = Table("attack", "what it is")
        for row in KNOWN.items():
            table.add_row(*row)
        console.print(table)
        return 0
    if not command.models:
        raise UserError("eval needs at least one run directory or model: fastdynat eval RUN")
    with StopRequest() as stop:
        evaluate_runs(command.models, command.eval, console, should_stop=stop.requested)
    return 128 + stop.signal if stop.signal else 0


def _export(argv: list[str]) -> int:
    command = tyro.cli(ExportCommand, args=normalize(argv, own=["--out"]), prog="fastdynat export", config=FLAT)
    console = error_console()
    export_run(command.run, command.export, lambda text: console.print(text, markup=False))
    return 0


def _report(argv: list[str]) -> int:
    command = tyro.cli(ReportCommand, args=normalize(argv, own=["--out"]), prog="fastdynat report", config=FLAT)
    if not command.runs:
        raise UserError("report needs at least one run directory: fastdynat report RUN")
    return run_report(command.runs, command.report, error_console())


def _boundary(argv: list[str]) -> int:
    command = tyro.cli(BoundaryCommand, args=normalize(argv), prog="fastdynat boundary", config=FLAT)
    require_run(command.run)
    check_picture("chart", command.chart)
    check_writable(Path(command.chart))
    from fastdynat.evaluation.speed_chart import draw_speeds  # extra `plots`, which has been looked for

    print(f"{draw_speeds(command.run, Path(command.chart))} validations of {command.run}: {command.chart}")
    return 0


def _bench(argv: list[str]) -> int:
    method = method_class(_early(argv).method or BenchCommand.method)
    command_type: Any = BenchCommand.__class_getitem__(method.options_type)  # type: ignore[attr-defined]
    argv = normalize(argv, _own_flags(method.options_type))
    default = BenchCommand(method=method.name, options=method.options_type())
    command = tyro.cli(command_type, args=argv, default=default, prog="fastdynat bench", config=FLAT)
    groups = {f.name: getattr(command, f.name) for f in dataclasses.fields(command) if f.name != "bench"}
    console, errors = Console(width=None if sys.stdout.isatty() else 180), error_console()
    return run_bench(TrainConfig(**groups), command.bench, console, lambda text: errors.print(text, markup=False))


def _compare(argv: list[str]) -> int:
    file = _early(argv).config
    shared = shared_config(None if file is None else Path(file))
    groups = {name: getattr(shared, name) for name in ("data", "model", "attack", "optim", "engine")}
    log = LogConfig(**{f.name: getattr(shared.run, f.name) for f in dataclasses.fields(LogConfig)})
    default = CompareCommand(config=file, run=log, **groups)
    command = tyro.cli(
        CompareCommand, args=normalize(argv, own=["--out"]), default=default, prog="fastdynat compare", config=FLAT
    )
    asked = replace(shared, run=RunConfig(**vars(command.run)), **{name: getattr(command, name) for name in groups})
    return run_compare(asked, command.compare, Console(width=None if sys.stdout.isatty() else 180), error_console())


def _doctor(argv: list[str]) -> int:
    command = tyro.cli(DoctorCommand, args=normalize(argv), prog="fastdynat doctor", config=FLAT)
    return doctor.run(json=command.json, try_compile=command.try_compile)


def _recipes(argv: list[str]) -> int:
    tyro.cli(RecipesCommand, args=normalize(argv), prog="fastdynat recipes", config=FLAT)
    table = Table("recipe", "method", "what it is")
    for name in recipe_names():
        values, about = read_recipe(name)
        table.add_row(name, values["method"], about)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


COMMANDS = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "export": _export,
    "report": _report,
    "boundary": _boundary,
    "recipes": _recipes,
    "bench": _bench,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 diverged (bench: got slower), 2 bad input, 128+n stopped by signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown_name("command", argv[0], COMMANDS)
        return COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        print(f"fastdynat: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdynat: interrupted", file=sys.stderr)
        return 130
