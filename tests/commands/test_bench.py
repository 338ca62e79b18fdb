"""`fastdynat bench`: the right work is timed, counts are right, results read back, bad input is refused."""

import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import needs
from rich.console import Console
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.commands.bench import auto, results, rows, work
from fastdynat.commands.bench import benchmark as run
from fastdynat.commands.bench.bench_config import BenchConfig
from fastdynat.commands.bench.flops import count, count_step
from fastdynat.commands.bench.plain_dynat import NOISE, PlainDynat
from fastdynat.commands.bench.profiling import KINDS, profile_step
from fastdynat.commands.bench.settings import SWITCHES, resolved_setting, switch_values
from fastdynat.commands.bench.stopwatch import Samples, Stopwatch, take_turns
from fastdynat.commands.bench.work import (
    engine_attack,
    engine_step,
    torchattacks_attack,
    weight_gradient_attack,
)
from fastdynat.commands.main import main
from fastdynat.config import AttackConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastdynat.data import Batch, TrainSplit, dataset_info
from fastdynat.data.random_images import random_split
from fastdynat.execution import graphed_call
from fastdynat.machine.peak_memory import PeakMemory
from fastdynat.methods import Dynat, DynatOptions, Madry, MadryOptions
from fastdynat.models import build_model
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training import TrainStep
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision

CPU = torch.device("cpu")
WATCH = Stopwatch(CPU)
TINY = ["--model", "small", "--batch-size", "8", "--steps", "2", "--repeats", "1", "--device", "cpu"]
EPS, STEP, STEPS, N = 0.05, 0.02, 3, 8


def setting(
    model: str = "small", batch_size: int = 8, steps: int = 2, **engine: Any
) -> tuple[TrainConfig[Any], TrainSplit]:
    """A resolved configuration of DYNAT on random images of CIFAR-10's size, and the images."""
    info = dataset_info("cifar10")
    assert info is not None
    config = TrainConfig(
        options=DynatOptions(),
        data=DataConfig(data="cifar10", batch_size=batch_size),
        model=ModelConfig(model=model, guide="small"),
        attack=AttackConfig(steps=steps),
        engine=EngineConfig(device="cpu", **engine),
    )
    split = random_split(info, batch_size, seed=1)
    return resolved_setting(config, split), split


def bench(*flags: str, code: int = 0) -> None:
    guide = [] if "--method" in flags else ["--guide", "small"]  # of DYNAT, the default
    assert main(["bench", *TINY, *guide, *flags]) == code


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


class Calls(TorchDispatchMode):
    """Operator calls by name, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func._overloadpacket), args))
        return func(*args, **(kwargs or {}))

    def weight_gradients(self) -> int:
        return sum(args[-1][1] for name, args in self.seen if name == "aten.convolution_backward")


# The plain loop


@pytest.mark.parametrize("updates", [1, 3])
def test_the_released_loop_makes_our_update(updates: int) -> None:
    """All weights and running statistics in float64, from one noise. The guide's move more often."""
    ours = [tiny_cnn(seed, classes=4, dtype=torch.float64) for seed in (1, 2)]
    theirs = copy.deepcopy(ours)
    networks = NetworkSet(*ours, image_shape=(3, 8, 8), device=CPU)
    optim = OptimConfig(lr=0.1, epochs=1, weight_decay=2e-4, momentum=0.9)
    spec = PGDSpec(EPS, STEP, STEPS, start="gaussian")
    step = TrainStep(Dynat(DynatOptions()), networks, spec, optim, Precision("off", CPU), lambda n: 1.0)
    numbers = {
        "eps": EPS,
        "step_size": STEP,
        "steps": STEPS,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
    }
    for update in range(updates):
        x, labels = torch.rand(N, 3, 8, 8, dtype=torch.float64), torch.randint(4, (N,))
        torch.manual_seed(update)
        step(Batch(x, labels, torch.arange(N)))
        torch.manual_seed(update)
        noise = (start_point(x, "gaussian", norm="linf", eps=EPS) - x) / NOISE
        if update == 0:
            plain = PlainDynat(*theirs, **numbers)
        plain.draw = lambda shape, noise=noise: noise
        plain(x, labels)
    for mine, other in zip(ours, theirs, strict=True):
        for (name, p), q in zip(mine.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.equal(ours[0][0].weight, tiny_cnn(1, classes=4, dtype=torch.float64)[0].weight)
    for (name, b), c in zip(ours[0].named_buffers(), theirs[0].buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-12, msg=name)
    # One guide pass per batch against one per attack step and one for its loss; `tiny_cnn` itself makes one.
    moved = [int(guide[1].num_batches_tracked) - 1 for guide in (ours[1], theirs[1])]
    assert moved == [updates, (STEPS + 1) * updates]


# Counts


def test_flops_of_a_small_net_by_hand() -> None:
    """One 3x3 convolution 3 -> 8 at stride 2 on 8x8 and one linear layer 32 -> 10; a multiply-add is two."""
    conv, linear = 2 * 4 * 4 * 8 * 3 * 9, 2 * 32 * 10
    flops = count_step(Madry(MadryOptions()), tiny_cnn(), None, (3, 8, 8), attack_steps=5)
    assert flops.forward == conv + linear
    assert flops.attack_step == 2 * flops.forward
    # The update needs no gradient at the image: forward and weight gradient of the convolution, all three of
    # the linear layer.
    assert flops.step == 5 * flops.attack_step + 2 * conv + 3 * linear


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("resnet18", 1.1108, 2.2182), ("preact_resnet18", 1.1108, 2.2182), ("resnet18_s1122", 3.5268, 7.0500)],
)
def test_flops_of_resnets_are_the_published_ones(name: str, forward: float, backward: float) -> None:
    """GFLOP per CIFAR image; PGD-10, ResNet-18, 50,000 images: 1.1108 PF of attack, 0.1664 PF of update."""
    network = build_model(name, num_classes=10, image_shape=(3, 32, 32))
    flops = count_step(Madry(MadryOptions()), network, None, (3, 32, 32), attack_steps=10)
    assert flops.forward / 1e9 == pytest.approx(forward, abs=5e-5)
    assert flops.step / 1e9 == pytest.approx(10 * 2 * forward + forward + backward, rel=1e-4)


def test_dynat_adds_a_guides_update_and_a_clean_pass() -> None:
    def both() -> tuple[nn.Module, nn.Module]:
        return tiny_cnn(1), tiny_cnn(2)

    madry = count_step(Madry(MadryOptions()), both()[0], None, (3, 8, 8), 5)
    dynat = count_step(Dynat(DynatOptions()), *both(), (3, 8, 8), 5)
    update = madry.step - 5 * madry.attack_step
    assert dynat.step == madry.step + update + madry.forward


@pytest.mark.parametrize("engine", [{}, {"fold": "off", "closed_form": False}])
def test_an_attack_step_is_two_forwards_and_no_weight_gradient(engine: dict[str, Any]) -> None:
    config, split = setting(**engine)
    network = build_model("small", num_classes=10, image_shape=(3, 32, 32))
    flops = count_step(Madry(MadryOptions()), network, None, (3, 32, 32), attack_steps=2)
    ours, naive = engine_attack(config, split), weight_gradient_attack(config, split)
    assert count(ours.call) == 8 * 2 * flops.attack_step
    with Calls() as calls:
        ours.call()
    assert calls.weight_gradients() == 0
    with Calls() as calls:
        naive.call()
    assert calls.weight_gradients() == 2 * 4  # the small network's convolutions


def test_the_naive_attack_is_the_same_attack() -> None:
    config, split = setting(steps=3)
    results = []
    for make in (engine_attack, weight_gradient_attack):
        made = make(config, split)
        torch.manual_seed(4)
        results.append(made.call())
    assert torch.equal(*results)


def test_a_step_runs_the_guide_once_and_never_waits_for_the_device() -> None:
    config, split = setting()
    made = engine_step(config, split)
    assert made.step is not None
    made.call()
    guides: list[Tensor] = []
    made.step.networks.raw["guide"].register_forward_hook(lambda module, args, out: guides.append(out))
    with Calls() as calls:
        made.call()
    assert len(guides) == 1
    waits = {
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.equal",
        "aten.is_nonzero",
        "aten.masked_select",
    }
    assert waits.isdisjoint(name for name, _ in calls.seen)
    with Calls() as calls:
        float(torch.ones(()))
    assert waits & {name for name, _ in calls.seen}  # the check can fail


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_our_attack_is_checked_as_it_is_timed(amp: str) -> None:
    config, split = setting(batch_size=32, steps=5, amp=amp)
    made = engine_attack(config, split)
    assert made.fidelity is not None
    found = made.fidelity()
    assert found.images == 4 * 32
    assert not found.weaker
    assert found.loss_fast == pytest.approx(found.loss_reference, rel=2e-3)
    assert found.loss_reference > found.loss_clean + 0.1  # it is an attack


# Clocks


class VirtualTime(Stopwatch):
    """Work says itself how long it took: it adds to `now`, in seconds."""

    now = 0.0

    def mark(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("device", "slow"),
    [("cpu", 2), ("cuda", 2), ("cuda", graphed_call.WARM_UP_CALLS + 1)],
    ids=["check of compiled code", "the same, on a GPU", "capture"],
)
def test_rates_of_an_unfinished_benchmark_are_those_of_prepared_work(
    device: str, slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, calls = VirtualTime(CPU), 0

    def call() -> None:
        nonlocal calls
        calls += 1
        watch.now += 100.0 if calls == slow else 1.0

    kept: list[float] = []
    monkeypatch.setattr(rows, "PeakMemory", lambda device: PeakMemory(CPU))
    plan = rows.RowPlan("row", "step", 8, prepare=lambda: work.Work(call))
    display = ProgressDisplay(Console(), quiet=True)
    rows.prepare_rows(
        [plan],
        watch,
        torch.device(device),
        BenchConfig(),
        display,
        lambda found: kept.append(found[0].samples.median),
    )
    assert kept == [1.0]


def test_a_gpu_that_is_not_the_current_one_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            asked.append(stream)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 6000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(device))
    assert Stopwatch(torch.device("cuda:1")).time(lambda: None, 3) == 2.0
    assert asked == [torch.device("cuda:1"), "stream of cuda:1", "stream of cuda:1"]


def test_rows_take_turns_and_quantiles_are_numpys() -> None:
    order: list[str] = []
    taken = take_turns(WATCH, [lambda: order.append("a"), lambda: order.append("b")], seconds=1.0, repeats=3)
    assert order == ["a", "b"] * 4  # the first round only says how long each takes
    assert [len(samples.seconds) for samples in taken] == [3, 3]
    numbers = numpy.random.default_rng(0).random(11)
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert Samples(tuple(numbers)).quantile(q) == pytest.approx(numpy.quantile(numbers, q))


def test_profile_finds_both_gradients_of_a_convolution() -> None:
    network, x = (
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)),
        torch.rand(4, 8, 32, 32),
    )

    def update() -> None:
        network(x).sum().backward()

    def attack() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(network(leaf).sum(), leaf)

    kinds = {
        name: profile_step(call, WATCH, torch.float32)
        for name, call in (("update", update), ("attack", attack))
    }
    for seconds in kinds.values():
        assert tuple(seconds) == KINDS
        assert (
            min(seconds[k] for k in ("conv forward", "conv input gradient", "batch norm", "Python, overhead"))
            > 0
        )
    assert kinds["update"]["conv weight gradient"] > 0
    assert kinds["attack"]["conv weight gradient"] == 0


# Switches


def test_every_switch_turns_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: what the engine was built with, how its operators ran, and what its network read."""
    built: list[dict[str, Any]] = []
    make, run = AttackEngine.__init__, AttackEngine.run

    def init(self: AttackEngine, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        switches = kwargs["switches"]
        own = {"amp": switches.dtype, "compile": switches.compile, "fold": self.replica.num_folded > 0}
        built.append(own | {"closed_form": switches.closed_form, "channels_last": switches.channels_last})

    def spied(self: AttackEngine, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        from fastdynat.ops import selected_backend

        built[-1] |= {
            "kernels": selected_backend("cpu"),
            "layout": x.is_contiguous(memory_format=torch.channels_last),
        }
        return run(self, x, *args, **kwargs)

    monkeypatch.setattr(AttackEngine, "__init__", init)
    monkeypatch.setattr(AttackEngine, "run", spied)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)  # that it is asked for is enough
    config, split = setting(amp="bf16")
    task = rows.BenchSetup(config, config, lambda c: c, split, 1, 1)
    engine_attack(config, split).call()
    asked, found = built[-1], {}
    for plan in rows._switched(task):
        if plan.kind == "attack" and not plan.why_not:
            assert plan.prepare is not None
            plan.prepare().call()
            found[plan.switch] = built[-1]
    assert found.keys() == {
        "amp",
        "channels_last",
        "compile",
        "fold",
        "closed_form",
        "kernels",
        "weight gradients",
    }
    for name, seen in found.items():
        differs = {key for key in asked if seen.get(key, asked[key]) != asked[key]}
        assert differs == ({name} - {"weight gradients"}) | (
            {"layout"} if name == "channels_last" else set()
        ), name


def test_switches_are_named_after_flags_and_say_why_not() -> None:
    config, split = setting()
    task = rows.BenchSetup(config, config, lambda c: c, split, 1, 1)
    reasons = {(plan.switch, plan.kind): plan.why_not for plan in rows._switched(task)}
    assert reasons[("graphs", "attack")] == "needs a CUDA device"
    assert reasons[("guide_stream", "step")] == "needs a CUDA device"
    assert {s.name for s in SWITCHES} >= switch_values(config).keys() >= {"amp", "fold", "kernels"}


# The command


@needs("torchattacks")
def test_rows_of_peers_and_the_file_comes_back_as_a_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    bench("--amp", "bf16", "--peers", "--json", str(out))
    doc = stored(out)
    assert doc["format"] == "fastdynat-bench/1"
    names = {
        kind: [row["name"] for row in doc["rows"] if row["kind"] == kind]
        for kind in ("attack", "step", "matmul")
    }
    peers = ["torchattacks.PGD", "torchattacks.PGD under bf16 autocast"]
    assert names["attack"] == ["fp32", "bf16", *peers]
    assert names["step"] == ["fp32", "bf16", "released loop in plain PyTorch"]
    assert names["matmul"] == ["matrix product, fp32", "matrix product, bf16"]
    for row in doc["rows"]:
        assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
        assert row["first_call_seconds"] > 0
        if row["kind"] != "matmul":
            per_second = row["images_per_s"]["median"]
            assert per_second == pytest.approx(8 / row["seconds"]["median"], rel=1e-3)
            assert row["flops_per_s"] == pytest.approx(per_second * row["flops_per_image"], rel=1e-3)
    assert [row["fidelity"]["weaker"] for row in doc["rows"] if row["kind"] == "attack" and row["ours"]] == [
        False,
        False,
    ]
    assert list(doc["phases"])[:4] == ["data", "guide (inner half)", "replica refresh", "attack"]
    assert doc["commit"]
    assert doc["environment"]["torch"] == torch.__version__
    step = next(row for row in doc["rows"] if row["kind"] == "step" and row["name"] == "bf16")
    assert doc["epoch"]["extrapolated_seconds"] == pytest.approx(
        50_000 / step["images_per_s"]["median"], rel=1e-2
    )
    assert "extrapolated, not measured" in capsys.readouterr().out

    faster = copy.deepcopy(doc)
    for row in faster["rows"]:
        if row["kind"] != "matmul":
            row["images_per_s"]["median"] *= 1000 if row["ours"] else 1e-9  # peers are not compared
    (tmp_path / "b.json").write_text(json.dumps(faster))
    bench("--amp", "bf16", "--baseline", str(out), "--tolerance", "0.99")
    bench("--amp", "bf16", "--baseline", str(tmp_path / "b.json"), "--tolerance", "0.99", code=1)
    assert capsys.readouterr().out.count("slower") == 2


def test_rows_of_switches_budget_and_missing_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchattacks" else found(name)
    )
    out = tmp_path / "a.json"
    bench("--peers", "--switches", "--budget", "1e-9", "--json", str(out))
    doc = stored(out)
    assert {row["kind"] for row in doc["rows"]} == {"matmul"}  # the rate of the machine is always there
    reasons = {(row["kind"], row["name"]): row["reason"] for row in doc["skipped"]}
    assert reasons[("attack", "torchattacks.PGD")] == "not installed: pip install 'fastdynat[peer]'"
    assert reasons[("attack", "fp32")] == "out of --budget"
    assert reasons[("attack", "with weight gradients")] == "out of --budget"


def test_rows_are_kept_as_they_come_the_asked_setting_and_its_peer_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interruption in the fourth row leaves the first three, and the file of an earlier measurement."""
    out, partial = tmp_path / "a.json", tmp_path / "a.json.partial"
    out.write_text("earlier")
    seen: list[list[tuple[str, str]]] = []
    build = work.engine_attack

    def third(*arguments: Any) -> work.Work:
        doc = json.loads(partial.read_text())
        seen.append([(row["kind"], row["name"]) for row in doc["rows"]])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return build(*arguments)

    monkeypatch.setattr(work, "engine_attack", third)
    bench("--amp", "bf16", "--peers", "--switches", "--json", str(out), code=130)
    machine = [("matmul", "matrix product, fp32"), ("matmul", "matrix product, bf16")]
    steps = [("step", "bf16"), ("step", "released loop in plain PyTorch")]
    assert seen[0] == steps + machine
    assert out.read_text() == "earlier"
    doc = json.loads(partial.read_text())
    assert doc["complete"] is False
    assert [row["seconds"]["rounds"] for row in doc["rows"]] == [1] * len(doc["rows"])
    assert doc["epoch"]["extrapolated_seconds"] > 0
    capsys.readouterr()
    bench("--amp", "bf16", "--baseline", str(partial), code=2)
    assert "unfinished measurement" in capsys.readouterr().err

    monkeypatch.setattr(work, "engine_attack", build)
    bench("--json", str(out))
    assert "complete" not in stored(out)
    assert not partial.exists()


def test_a_timing_whose_attack_is_weaker_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = work.check_fidelity

    def weak(*args: Any, **kwargs: Any) -> Any:
        return replace(
            check(*args, **kwargs), loss_clean=0.0, loss_reference=2.0, loss_fast=1.0, loss_error=0.0
        )

    monkeypatch.setattr(work, "check_fidelity", weak)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)  # its row is not what is tested
    bench("--method", "madry", "--switches", "--compile", "off", "--json", str(tmp_path / "a.json"))
    doc = stored(tmp_path / "a.json")
    attacks = [row for row in doc["rows"] if row["kind"] == "attack"]
    assert len(attacks) > 2
    assert all(row["invalid"] for row in attacks if row["name"] != "with weight gradients")
    assert {gain["kind"] for gain in doc["switches"]} == {"step"}
    assert "INVALID" in capsys.readouterr().out
    bench(
        "--method", "madry", "--baseline", str(tmp_path / "a.json"), "--tolerance", "0.99"
    )  # the step's row is compared
    assert "attack, fp32" not in capsys.readouterr().out
    for row in doc["rows"]:
        row["invalid"] = ""
    (tmp_path / "b.json").write_text(json.dumps(doc))  # all were valid before
    bench("--method", "madry", "--baseline", str(tmp_path / "b.json"), "--tolerance", "0.99", code=1)
    assert "INVALID" in capsys.readouterr().out.partition("rate, times that of")[2]


def test_a_gain_over_an_attack_that_does_not_count_is_none() -> None:
    """Only one of the two switched rows is valid."""
    common = {"kind": "attack", "ours": True, "invalid": ""}
    values = [
        common | {"name": "fp32", "switch": "", "images_per_s": {"median": 6.0}},
        common | {"name": "fold off", "switch": "fold", "images_per_s": {"median": 3.0}},
        common | {"name": "winograd off", "switch": "winograd", "images_per_s": {"median": 2.0}},
    ]
    values[2]["invalid"] = "weaker"
    assert results.gains(values) == [{"switch": "fold", "kind": "attack", "turned": "fold off", "gain": 2.0}]


def test_an_epoch_of_real_images_is_measured(tmp_path: Path) -> None:
    data = ["--data", "digits", "--train-size", "100", "--val-size", "10", "--epoch"]
    bench(*data, "--json", str(tmp_path / "a.json"), "--method", "natural")
    measured = stored(tmp_path / "a.json")["epoch"]["measured"]
    assert measured["images"] == 100
    assert measured["images_per_s"] == pytest.approx(100 / measured["seconds"], rel=1e-2)


@needs("matplotlib")
def test_pictures_and_the_table_of_kinds(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("rates.svg", "kinds.json", "kinds.svg")}
    bench("--chart", str(files["rates.svg"]), "--profile", str(files["kinds.json"]))
    assert tuple(stored(files["kinds.json"])["profile"]) == KINDS
    bench("--profile", str(files["kinds.svg"]))
    texts = {
        "rates.svg": ["images/s", "fp32", "training step"],
        "kinds.svg": ["conv input gradient", "optimiser"],
    }
    for name, expected in texts.items():
        picture = files[name].read_text()
        assert all(text in picture for text in expected), name
        assert "#767676" in picture  # between black and white, and nothing behind it
        assert "fill: #ffffff" not in picture


@contextmanager
def without(monkeypatch: pytest.MonkeyPatch, module: str) -> Iterator[None]:
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest)
        )
        yield


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "0"], "seconds must be above 0, got 0"),
        (["--seconds", "nan"], "seconds must be above 0"),
        (["--repeats", "0"], "repeats must be >= 1, got 0"),
        (["--budget", "0"], "budget must be above 0 seconds, got 0"),
        (["--tolerance", "1"], "tolerance must be a share in [0, 1), got 1"),
        (["--chart", "a.jpg"], "--chart must end in .svg, .png, .pdf, got 'a.jpg'"),
        (["--profile", "a.txt"], "--profile must end in .json, .svg, .png, .pdf, got 'a.txt'"),
        (["--chart", "a.svg"], "--chart a.svg needs matplotlib: pip install 'fastdynat[plots]'"),
        (["--json", "nowhere/a.json"], "cannot write nowhere/a.json"),
        (["--baseline", "nowhere.json"], "cannot read nowhere.json"),
        (["--baseline", "text"], "text is not a text file in UTF-8 (byte 0); write one with --json text"),
        (["--baseline", "other.json"], "other.json is not a result of fastdynat bench"),
        (["--method", "dynta"], "unknown method 'dynta': did you mean 'dynat'"),
        (["--model", "resnet81"], "unknown model 'resnet81'"),
        (["--graphs", "on"], "--graphs on needs a CUDA device"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"\xff\xfe nothing")
    (tmp_path / "other.json").write_text('{"format": "fastdynat-eval/1"}')
    before = sorted(tmp_path.iterdir())
    with without(monkeypatch, "matplotlib"):
        bench(*flags, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdynat: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("part", "key", "message"),
    [
        ("settings", "batch_size", "another setting: batch_size was 'x'"),
        ("environment", "cpu", "another machine: cpu was 'x'"),
    ],
)
def test_a_baseline_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, key: str, message: str
) -> None:
    out = tmp_path / "a.json"
    bench("--method", "natural", "--json", str(out))
    doc = stored(out)
    doc[part][key] = "x"
    out.write_text(json.dumps(doc))
    bench("--method", "natural", "--baseline", str(out), code=2)
    assert message in capsys.readouterr().err


# Time itself


@pytest.mark.slow
@needs("torchattacks")
def test_our_attack_is_not_slower_than_torchattacks() -> None:
    """Float32, eager, interleaved; compares the fastest of each, which other load disturbs least."""
    config, split = setting("resnet18", batch_size=8, channels_last="off")
    made = [make(config, split) for make in (engine_attack, torchattacks_attack)]
    ours, peer = take_turns(WATCH, [m.call for m in made], seconds=1.0, repeats=15)
    assert min(ours.seconds) <= min(peer.seconds) / 0.95


# --auto


def automatic(config: TrainConfig[Any], amp: str = "off", mode: str = "off") -> TrainConfig[Any]:
    """`resolved_setting` on a machine where `amp` and `mode` are fast and channels-last is not."""
    e = config.engine
    e = replace(
        e,
        amp=amp if e.amp == "auto" else "off" if e.amp == "default" else e.amp,
        compile=mode if e.compile == "auto" else e.compile,
        channels_last="off" if e.channels_last == "auto" else e.channels_last,
        fold="on" if e.fold == "auto" else e.fold,
    )
    return replace(config, engine=replace(e, winograd="off" if e.amp != "off" else e.winograd))


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("mode", ["off", "default"])
def test_auto_compares_each_choice_with_all_that_could_be_taken(amp: str, mode: str) -> None:
    config = setting()[0]
    every, found = auto.decisions(config, lambda c: automatic(c, amp, mode))
    names = [s.name for s in every]
    assert len(set(names)) == len(names), "nothing is timed twice"
    by_flags = {d.flags: d for d in found}
    whole = by_flags["--amp --compile"]
    assert (whole.chosen.config.engine.amp, whole.chosen.config.engine.compile) == (amp, mode)
    pairs = {(s.config.engine.amp, s.config.engine.compile) for s in whole.others}
    assert pairs == {("off", "off"), ("bf16", "off"), ("off", "default"), ("bf16", "default")}
    (turned,) = by_flags["(none): winograd"].others
    assert (by_flags["(none): winograd"].chosen.config.engine.winograd, turned.config.engine.winograd) == (
        "auto",
        "off",
    )
    (turned,) = by_flags["(none): channels-last"].others
    assert turned.config.engine.channels_last == "on"
    assert by_flags["(none): fold"].others[0].config.engine.fold == "off"


def test_autos_ratio_is_to_the_best_that_was_timed() -> None:
    every, found = auto.decisions(setting()[0], lambda c: automatic(c, "bf16"))
    for s in every:
        s.seconds = [2.0, 1.0, 3.0] if s.config.engine.amp == "bf16" else [1.0, 1.5, 9.0]
    whole = next(d for d in found if d.flags == "--amp --compile")
    assert whole.ratio == pytest.approx(0.75)
    assert whole.best.config.engine.amp == "off"
    assert whole.values()["others"][every[0].name] == 0.75


def test_auto_prints_stores_and_exits_by_the_worst_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        run, "resolved_setting", lambda config, split: automatic(settled_before(config, split))
    )
    calls: list[str] = []

    def fake(config: Any, split: Any, fallbacks: Any) -> Any:
        calls.append(config.engine.compile)
        return work.Work(lambda: None)

    clock = iter(range(10**6))
    monkeypatch.setattr(auto, "engine_step", fake)
    monkeypatch.setattr(auto, "quiet_clock", lambda: lambda: float(next(clock)))
    bench("--auto", "--method", "madry", "--json", str(tmp_path / "a.json"))
    doc = stored(tmp_path / "a.json")
    assert doc["format"] == "fastdynat-auto/1"
    assert {row["ratio_to_best"] for row in doc["rows"]} == {1.0}, "every call takes one second of this clock"
    assert doc["processor"]["threads"] == torch.get_num_threads()
    assert doc["commit"]
    assert doc["convolutions"]
    assert "--amp --compile" in capsys.readouterr().out
    monkeypatch.setattr(auto, "LEAST", 1.01)
    bench("--auto", "--method", "madry", code=1)
    assert calls.count("default") > 0


def test_auto_times_compiled_code_after_both_of_its_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compared with the uncompiled step at the first call, and once more after a change of the weights."""
    monkeypatch.setattr(
        run, "resolved_setting", lambda config, split: automatic(settled_before(config, split))
    )
    now = [0.0]

    def fake(config: Any, split: Any, fallbacks: Any) -> Any:
        slow = iter([10.0, 10.0] if config.engine.compile != "off" else [10.0])

        def call() -> None:
            now[0] += next(slow, 1.0)

        return work.Work(call)

    monkeypatch.setattr(auto, "engine_step", fake)
    monkeypatch.setattr(auto, "quiet_clock", lambda: lambda: now[0])
    bench("--auto", "--method", "madry", "--json", str(tmp_path / "a.json"))
    rows = stored(tmp_path / "a.json")["rows"]
    assert {row["ratio_to_best"] for row in rows} == {1.0}
    assert any("compiled" in row["name"] for row in rows)


def settled_before(config: TrainConfig[Any], split: TrainSplit) -> TrainConfig[Any]:
    """`resolved_setting` without a trial of torch.compile, which takes a compiler's minute."""
    engine = replace(
        config.engine, compile="off" if config.engine.compile == "auto" else config.engine.compile
    )
    return resolved_setting(replace(config, engine=engine), split)


def test_auto_goes_with_no_other_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    bench("--auto", "--peers", code=2)
    assert "leave --peers out" in capsys.readouterr().err
