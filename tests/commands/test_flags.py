"""Flags: other spellings are understood; a refusal is one line with the flag and the nearest right one."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from fastdynat.commands import train
from fastdynat.commands.bench import command as bench
from fastdynat.commands.boundary.command import BoundaryCommand
from fastdynat.commands.compare.command import CompareCommand
from fastdynat.commands.compare.compare_config import CompareConfig, NoOptions, method_configs, shared_config
from fastdynat.commands.doctor.command import DoctorCommand
from fastdynat.commands.evaluate import command as evaluate
from fastdynat.commands.export.command import ExportCommand
from fastdynat.commands.main import main
from fastdynat.commands.pack import PackCommand
from fastdynat.commands.parsing import aliases
from fastdynat.commands.parsing.aliases import ALIASES, BARE, normalize
from fastdynat.commands.parsing.flags import Flag, flags_of
from fastdynat.commands.parsing.naming import name_flags
from fastdynat.commands.parsing.parse import early_flags, of_options
from fastdynat.commands.parsing.words import read_words
from fastdynat.commands.recipes import command as recipes
from fastdynat.commands.report.command import ReportCommand
from fastdynat.commands.speedrun.command import SpeedrunCommand
from fastdynat.config import TrainConfig
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, options_type
from fastdynat.methods.configs import default_config

TRAIN = {
    method: flags_of(
        of_options(train.TrainCommand, options_type(method)), train.TrainCommand(train=default_config(method))
    )
    for method in METHODS
}
OTHERS: dict[str, dict[str, Flag]] = {
    "eval": flags_of(evaluate.EvalCommand),
    "export": flags_of(ExportCommand),
    "pack": flags_of(PackCommand),
    "report": flags_of(ReportCommand),
    "boundary": flags_of(BoundaryCommand),
    "recipes": flags_of(recipes.RecipesCommand),
    "doctor": flags_of(DoctorCommand),
    "speedrun": flags_of(SpeedrunCommand),
    "compare": flags_of(CompareCommand),
    "bench": flags_of(
        of_options(bench.BenchCommand, options_type("dynat")),
        bench.BenchCommand(options=options_type("dynat")()),
    ),
}
TABLES: dict[str, tuple[list[str], dict[str, Flag]]] = {
    **{f"train {m}": (["train", "--method", m], flags) for m, flags in TRAIN.items()},
    **{name: ([name], flags) for name, flags in OTHERS.items()},
}
# Arguments beside the flag under test, so that only the flag is refused.
NEEDED = {
    "export": ["RUN", "--out", "x.pt"],
    "eval": ["RUN"],
    "pack": ["FILE"],
    "report": ["RUN"],
    "boundary": ["RUN"],
}


def wrong_values(flag: Flag) -> list[list[str]]:
    """Words that must be refused with the name of `flag`."""
    name = flag.name
    bad = [[f"{name}="]] if flag.values != "none" else [[f"{name}=3"], [f"{name}=x"]]
    if flag.values == "none":
        return bad
    if flag.bare is None:
        bad += [[name], [name, "--quiet-not"]] if name != "--set" else [[name]]
    if flag.choices:
        bad += [
            [name, "nosuch"],
            [f"{name}={flag.choices[0]}{flag.choices[0]}x"],
        ]  # twice "I" would be a choice of iad
    numbers = {int, float} & set(flag.kinds)
    if numbers and str not in flag.kinds:
        bad += [
            [name, "x"],
            [f"{name}=1,5"],
            [f"{name}=0x10"],
            [f"{name}=nan"],
            [f"{name}=1e400"],
            [f"{name}=-1e30"],
        ]
    if numbers == {int}:
        bad += [[f"{name}=1.5"], [f"{name}=1e3"], [name, "9" * 23], [f"{name}=-1"]]
    return bad


def typos(name: str, rng: random.Random) -> list[str]:
    """Misspellings of a flag: a letter twice, one left out, two exchanged."""
    i = rng.randrange(3, len(name) - 1) if len(name) > 4 else 2
    return [
        name[:i] + name[i] + name[i:],
        name[:i] + name[i + 1 :],
        name[:i] + name[i : i + 2][::-1] + name[i + 2 :],
    ]


def refusals() -> list[tuple[list[str], str]]:
    """Command lines that must be refused, each with what its one line must have in it."""
    rng, found = random.Random(0), []
    for command, (start, flags) in TABLES.items():
        needed = NEEDED.get(command, [])
        own = [flag for flag in flags.values() if not flag.positional]
        if (
            command.startswith("train") and command != "train dynat"
        ):  # the flags that all methods have are tried once
            own = [flag for flag in own if flag.name not in TRAIN["natural"] or flag.name == "--temperature"]
        known = (
            {flag.name for flag in own}
            | {f"--no-{flag.name[2:]}" for flag in own}
            | set(ALIASES)
            | {*aliases.VALUES, *aliases.GPU}
        )
        for flag in own:
            words = [w for w in needed if w not in ("--out", "x.pt")] if flag.name == "--out" else needed
            found += [([*start, *words, *bad], flag.name) for bad in wrong_values(flag)]
            found += [
                ([*start, *words, typo, "1"], typo)
                for typo in typos(flag.name, rng)
                if typo not in known and len(typo) > 2
            ]
    return found


REFUSALS = refusals()
SAMPLE = random.Random(1).sample(REFUSALS, 300)


def one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `argv` is refused."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:
        pytest.fail(f"{argv}: SystemExit {end.code}")
    out, err = capsys.readouterr()
    assert code == 2, argv
    assert out == "", argv
    lines = err.splitlines()
    assert len(lines) == 1, (argv, lines)
    assert lines[0].startswith("fastdynat: error: "), (argv, lines)
    return lines[0]


def check(cases: list[tuple[list[str], str]], capsys: pytest.CaptureFixture[str]) -> None:
    failed = []
    for argv, named in cases:
        line = one_line(argv, capsys)
        if named not in line or len(line) > 400:
            failed.append((argv, line))
    assert failed == []


def test_there_are_thousands_of_refusals() -> None:
    assert len(REFUSALS) > 3000


def test_a_sample_of_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(SAMPLE, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(REFUSALS, capsys)
    assert list(tmp_path.iterdir()) == []


def words_of(command: str, *argv: str) -> list[str]:
    """The words of a command as they reach tyro."""
    flags = TABLES[command][1]
    return read_words(normalize(argv, flags), flags, command, {}).for_tyro(flags)


@pytest.mark.parametrize("command", ["train dynat", "eval"])
def test_every_spelling_means_its_flag(command: str) -> None:
    flags = TABLES[command][1]
    for spelling, flag in ALIASES.items():
        if flag not in flags or spelling in flags:
            continue
        value = {"--norm": "linf", "--schedule": "cosine", "--opt": "adamw"}.get(flag, "3")
        words = [] if flags[flag].values == "none" else [value]
        for written in (spelling, spelling[:2] + spelling[2:].replace("-", "_")):
            assert words_of(command, written, *words) == words_of(command, flag, *words), spelling
        if words:
            assert words_of(command, f"{spelling}={value}") == words_of(command, flag, value)


def test_spellings_of_the_issue_and_of_known_scripts() -> None:
    """The spellings of TRADES, MART, AWP, Rice et al., robustness, PyTorch's examples and RobustBench."""
    trades = (
        "--batch-size 128 --test-batch-size 128 --epochs 76 --weight_decay 2e-4 --lr 0.1 "
        "--epsilon 0.031 --num-steps 10"
    )
    assert words_of(
        "train trades", *trades.split(), "--step_size", "0.007", "--no-cuda", "--model-dir", "m"
    ) == [
        *(
            "--batch-size=128",
            "--eval-batch-size=128",
            "--epochs=76",
            "--weight-decay=2e-4",
            "--lr=0.1",
            "--eps=0.031",
        ),
        *("--steps=10", "--step-size=0.007", "--device=cpu", "--run-dir=m"),
    ]
    rice = "--lr-max 0.1 --attack-iters 10 --pgd-alpha 2 --norm l_inf --awp-gamma 0.01 --half --data-path d"
    assert words_of("train madry", *rice.split()) == [
        *(
            "--lr=0.1",
            "--steps=10",
            "--step-size=2",
            "--norm=linf",
            "--awp=0.01",
            "--amp=fp16",
            "--data-dir=d",
        )
    ]
    robustness = (
        "--dataset cifar10 --constraint 2 --attack-lr 0.1 --attack-steps 7 --num-workers 4 "
        "--arch resnet18 --out-dir o"
    )
    assert words_of("train madry", *robustness.split()) == [
        *(
            "--data=cifar10",
            "--norm=l2",
            "--step-size=0.1",
            "--steps=7",
            "--workers=4",
            "--model=resnet18",
            "--run-dir=o",
        )
    ]
    torch = "-a resnet18 -j 4 -b 64 --wd 1e-4 --learning-rate 0.1 --gpu 1"
    assert words_of("train madry", *torch.split()) == [
        *(
            "--model=resnet18",
            "--workers=4",
            "--batch-size=64",
            "--weight-decay=1e-4",
            "--lr=0.1",
            "--device=cuda:1",
        )
    ]
    assert words_of(
        "eval", *["RUN", "--n_ex", "1000", "--threat_model", "Linf", "--gpu", "--dataset", "cifar10"]
    ) == [*("RUN", "--num-images=1000", "--norm=linf", "--device=cuda", "--data=cifar10")]


def test_a_commands_own_flag_is_no_spelling_of_another() -> None:
    assert words_of("train lbgat", "--alpha", "3") == ["--alpha=3"]
    assert words_of("train madry", "--alpha", "3") == ["--step-size=3"]
    assert words_of("export", "RUN", "--out", "x.pt") == ["RUN", "--out=x.pt"]
    assert words_of("train madry", "--out", "x") == ["--run-dir=x"]


def test_bare_flags() -> None:
    for flag, (value, _) in BARE.items():
        assert words_of("train dynat", flag, "--epochs", "3") == [f"{flag}={value}", "--epochs=3"]
        assert words_of("train dynat", "--epochs", "3", flag) == ["--epochs=3", f"{flag}={value}"]
        assert words_of("train dynat", flag, "off") == [f"{flag}=off"]
    assert words_of("eval", "--compile", "RUN", "--amp", "fp16") == [
        "RUN",
        f"--compile={BARE['--compile'][0]}",
        "--amp=fp16",
    ]
    with pytest.raises(
        UserError, match="--amp must be off, bf16, fp16 or auto, got 'bf61'; did you mean bf16"
    ):
        words_of("eval", "--amp", "bf61", "RUN")


def test_a_word_after_a_bare_flag_is_a_run_only_where_it_can_be_one(tmp_path: Path) -> None:
    auto = f"--amp={BARE['--amp'][0]}"
    for place in (str(tmp_path), "runs/nowhere", "timm:resnet18"):
        assert words_of("eval", "RUN", "--amp", place) == ["RUN", place, auto]
    with pytest.raises(UserError, match="--amp must be off, bf16, fp16 or auto, got 'nosuch'"):
        words_of("eval", "RUN", "--amp", "nosuch")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no run at nowhere"),
        ([".", "--data", "digits"], "is not a run directory"),
        (["timm:resnet18"], "comes without data: give --data"),
        ([".", "--weights", "w.pt"], "--weights w.pt is for models"),
    ],
)
def test_eval_measures_no_precision_for_what_is_not_there(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdynat.tuning.devices.choose", lambda *args, **kwargs: pytest.fail("measured"))
    assert message in one_line(["eval", *argv, "--amp"], capsys)


def test_values_that_begin_with_a_dash_and_several_values() -> None:
    assert words_of("train gairat", "--lam", "-1", "--weight-decay", "-.5") == [
        "--lam=-1",
        "--weight-decay=-.5",
    ]
    assert words_of("train dynat", "--milestones", "0.1", "0.2", "--quiet") == [
        "--milestones",
        "0.1",
        "0.2",
        "--quiet",
    ]
    assert words_of("compare", "--set", "a.b=1", "--set", "c.d=2") == ["--set=a.b=1", "--set=c.d=2"]
    assert words_of("train dynat", "--no-download", "--steps", "None") == ["--no-download", "--steps=None"]


def test_the_last_of_a_repeated_flag_counts_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    flags = TRAIN["dynat"]
    read = read_words(
        ["--epochs", "2", "--epochs=5", "--nesterov", "--no-nesterov", "--seed", "1", "--seed", "1"],
        flags,
        "train",
        {},
    )
    assert read.for_tyro(flags) == ["--epochs=5", "--no-nesterov", "--seed=1"]
    assert read.notes == [
        "--epochs is given twice: 5 counts, not 2",
        "--nesterov is given twice: off counts, not on",
    ]
    assert main(["train", "--epochs", "2", "--epochs", "3", "--device", "cuda:77"]) == 2
    assert "fastdynat: note: --epochs is given twice: 3 counts, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--fold", "x"], "--fold must be on, off or auto, got 'x'"),
        (["train", "--squish"], "unknown flag --squish"),
        (["train", "--epoch-s", "3"], "did you mean --epochs"),
        (
            ["train", "--method", "madry", "--beta", "3"],
            "unknown flag --beta: it is an option of --method dynat or hat or iad or mail or mart or trades",
        ),
        (["compare", "--beta", "3"], "write --set METHOD.KEY=VALUE"),
        (["train", "--gpu", "0,1"], "--gpu must be the number of one GPU, got '0,1'"),
        (["train", "--gpus", "4"], "--gpus may mean one GPU or a number of GPUs: use --device cuda:N"),
        (["train", "--gpu_num=4"], "torchrun --nproc-per-node N -m fastdynat ... for N of them"),
        (["train", "word"], "unexpected 'word': fastdynat train takes only flags"),
        (["train", "--nesterov", "yes"], "unexpected 'yes'"),
        (["train", "--nesterov=yes"], "--nesterov takes no value: write --nesterov, or --no-nesterov"),
        (["export"], "needs a run directory: fastdynat export RUN"),
        (["export", "RUN"], "fastdynat export needs --out"),
        (
            ["export", "RUN", "other", "--out", "x.pt"],
            "unexpected 'other': fastdynat export takes only one: a run directory",
        ),
        (["eval", ""], "must not be empty"),
        (["train", "--step-size", "0"], "--step-size must be above 0"),
        (["train", "--epsilon", "nan"], "--eps must be a number"),
        (["train", "--model", "resnet81"], "--model: unknown model 'resnet81': did you mean 'resnet18'"),
        (["train", "--awp", "1e20"], "--awp must be at most 1, got"),
        (["train", "--epochs", "1" + "0" * 23], "--epochs must be at most 1e+06"),
        (["train", "--epochs", "1e23"], "--epochs must be a whole number, got '1e23'"),
        (["train", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["train", "--lr", "inf"], "--lr must be at most 1e+30, got inf"),
        (["train", "--run-dir", ""], "--run-dir must not be empty"),
        (["train", "--data-dir", " "], "--data-dir must not be empty"),
        (["train", "--seed", "-1"], "--seed must be in"),
        (["train", "--method", "n_fgsm", "--noise", "1e12"], "--noise must be above 0"),
        (["train", "--method"], "--method needs a value"),
        (["train", "--config="], "--config must not be empty"),
        # Accepted without effect before.
        (["train", "--method", "madry", "--guide", "nosuch"], "--guide nosuch: method madry has no guide"),
        (["train", "--train-size", "5000"], "--train-size 5000: digits has 1294 training images"),
        (["train", "--awp-warmup", "3"], "--awp-warmup has no effect: needs --awp"),
        (["train", "--milestones", "0.2"], "--milestones has no effect: --schedule release has none"),
        (
            ["train", "--gamma", "0.5", "--schedule", "cosine"],
            "--gamma has no effect: --schedule cosine has none",
        ),
        (["train", "--early-share", "0.7"], "--early-share has no effect: needs --early-steps"),
        (["train", "--ratio", "0.5", "2"], "--ratio has no effect: needs --scale"),
        (["train", "--remode", "const"], "--remode has no effect: needs --reprob"),
        (
            ["train", "--mixup", "0.8", "--mixup-switch-prob", "0.1"],
            "--mixup-switch-prob has no effect: needs both --mixup and --cutmix",
        ),
        (["train", "--mixup-groups", "4"], "--mixup-groups has no effect: needs --mixup or --cutmix"),
        (["train", "--data-dir", "D"], "--data-dir has no effect: --data digits is embedded"),
        (
            ["train", "--loader", "resident", "--workers", "2"],
            "--workers has no effect: --loader resident has none",
        ),
        (["train", "--temperature", "4"], "--temperature has no effect: needs --label-type soft"),
        (["train", "--slope", "4"], "--slope has no effect: needs --weighting mail"),
        (["train", "--awp-objective", "trades"], "--awp-objective has no effect: needs --awp"),
        (["train", "--method", "mail", "--beta", "4"], "--beta has no effect: needs --base trades"),
        (
            ["train", "--method", "vat", "--search", "pgd", "--xi", "1"],
            "--xi has no effect: needs --search power",
        ),
        (["train", "--val-every", "2", "--val-size", "0"], "--val-every has no effect: --val-size 0"),
    ],
)
def test_refused_in_one_line(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--epochs", "2", "--quiet"] if argv[0] == "train" and "--epochs" not in argv else []
    assert main([*argv, *quick] if message.startswith("--train-size") else argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdynat: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_flag_that_repeats_its_default_is_no_mistake(tmp_path: Path) -> None:
    run = [
        *(
            "train",
            "--run-dir",
            str(tmp_path / "run"),
            "--train-size",
            "40",
            "--val-size",
            "20",
            "--batch-size",
            "20",
        )
    ]
    extra = [
        "--gamma",
        "0.1",
        "--awp",
        "0",
        "--awp-warmup",
        "0",
        "--guide",
        "auto",
        "--steps",
        "1",
        "--quiet",
    ]
    assert main([*run, "--epochs", "1", "--method", "madry", *extra]) == 0
    # A stored configuration starts another run.
    again = [
        "train",
        "--config",
        str(tmp_path / "run" / "config.yaml"),
        "--run-dir",
        str(tmp_path / "again"),
        "--quiet",
    ]
    assert main(again) == 0


def test_what_a_start_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--train-size", "40", "--val-size", "20", "--batch-size", "20", "--quiet"]
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "a"),
                "--method",
                "natural",
                *tiny,
                "--epochs",
                "1",
                "--steps",
                "7",
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "no attack in training (linf); evaluated at eps 0.1" in said
    assert "steps 7 has no effect: method natural has no attack in training" in said
    assert "attack:" not in said
    assert "trains at lr/5 = 0.006" in said
    assert "--schedule constant trains at 0.03" in said
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "b"),
                "--method",
                "madry",
                *tiny,
                "--epochs",
                "2",
                "--steps",
                "1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "lr/5" not in said
    assert "1 steps of 0.025" in said
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "c"),
                "--method",
                "vat",
                *tiny,
                "--epochs",
                "2",
                "--step-size",
                "0.1",
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "method vat uses its own search; evaluated" in said
    assert "step_size 0.1 has no effect: method vat uses its own search" in said


def test_the_guide_of_a_comparison_is_for_the_methods_that_have_one() -> None:
    shared: TrainConfig[NoOptions] = shared_config(None)
    shared = replace(shared, model=replace(shared.model, guide="small"))
    configs = method_configs(shared, CompareConfig(methods="madry,dynat"))
    assert (configs["madry"].model.guide, configs["dynat"].model.guide) == ("auto", "small")


def test_messages_name_the_flag_that_was_given() -> None:
    assert (
        name_flags("step_size must be above 0", ["train", "--config", "c.yaml"])
        == "step_size must be above 0"
    )
    assert (
        name_flags("step_size must be above 0", ["train", "--attack_step=0"]) == "--step-size must be above 0"
    )
    assert name_flags("no run at x", ["eval", "x"]) == "no run at x"


def test_early_flags() -> None:
    assert early_flags(["--method", "mart", "--epochs", "3", "--method=alp"]) == {"--method": "alp"}
    with pytest.raises(UserError, match="--resume needs a value"):
        early_flags(["--resume", "--quiet"])


def test_help_texts_have_no_line_breaks_of_the_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit) as end:
        main(["eval", "--help"])
    assert end.value.code == 0
    assert "else the fastest that is correct on" in capsys.readouterr().out
