"""Automatic choices: capability before measurement, measurement before assumption, all reasons told."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import tiny_cnn

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.commands.evaluate.settle import with_amp_chosen
from fastdynat.commands.parsing.aliases import BARE
from fastdynat.compat.torchattacks import PGD
from fastdynat.config import EngineConfig, TrainConfig, override
from fastdynat.config.eval_config import EvalConfig
from fastdynat.data import dataset_info
from fastdynat.machine import OtherLoad, capability, free_cores
from fastdynat.machine.capability import processor
from fastdynat.machine.racing import quiet_clock, race
from fastdynat.methods.configs import default_config
from fastdynat.training.resolve import resolve
from fastdynat.training.resolve_engine import with_stored_choices
from fastdynat.tuning import choice_table, choices, choose, measurements, slower_than_float32
from fastdynat.tuning.devices import pick_amp, pick_half
from fastdynat.tuning.workload import ConvolutionSetting, Layer, convolution_settings, passes

CPU = torch.device("cpu")
BOTH, NEITHER = (
    {"bf16": "", "fp16": ""},
    {name: f"{name} has no instructions on this CPU" for name in ("bf16", "fp16")},
)
ONLY_BF16 = {"bf16": "", "fp16": NEITHER["fp16"]}


class Machine:
    """A made-up processor: its instructions, and the time of each setting (in ms)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.lacking, self.milliseconds = BOTH, dict[str, float]()
        self.now, self.timed = 0.0, list[str]()
        monkeypatch.setattr(choices, "half_types", lambda device: self.lacking)
        monkeypatch.setattr("fastdynat.tuning.devices.half_types", lambda device: self.lacking)
        monkeypatch.setattr(choices, "passes", self._passes)
        monkeypatch.setattr(choices, "update_call", lambda *_: lambda: None)
        monkeypatch.setattr(Layer, "scale", lambda *_: 1.0)
        monkeypatch.setattr("fastdynat.machine.racing.quiet_clock", lambda: lambda: self.now)
        monkeypatch.setattr(choices, "_known", {})
        self.load(monkeypatch, free=64, share=0.0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @staticmethod
    def load(monkeypatch: pytest.MonkeyPatch, *, free: int, share: float) -> None:
        """So many cores are free, and others take such a share of them."""
        monkeypatch.setattr(choices, "free_cores", lambda: free)
        monkeypatch.setattr(choices.OtherLoad, "share", lambda self: share)
        monkeypatch.setattr("os.cpu_count", lambda: 2)

    def _passes(self, setting: ConvolutionSetting, layer: Layer, images: int) -> Callable[[], None]:
        def call() -> None:
            self.timed.append(setting.name)
            self.now += self.milliseconds.get(setting.name, 10.0) / 1000

        return call

    def forget(self) -> None:
        """A new process, which has the files alone."""
        choices._known.clear()
        self.timed.clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.fixture
def said() -> list[str]:
    return []


def picked(mode: str, device: torch.device, notes: list[str], **options: Any) -> str:
    """The precision that `pick_amp` takes; its note goes to `notes`."""
    amp, note = pick_amp(mode, device, **options)
    notes += [note] if note else []
    return amp


def half(amp: str, ms: float) -> dict[str, float]:
    return {f"{amp}, contiguous": ms, f"{amp}, channels-last": ms}


def test_without_instructions_a_type_is_not_even_timed(machine: Machine, said: list[str]) -> None:
    machine.lacking, machine.milliseconds = NEITHER, half("bf16", 0.001) | half("fp16", 0.001)
    assert picked("auto", CPU, said) == "off"
    assert not [name for name in machine.timed if name.startswith(("bf16", "fp16"))]
    assert len(said) == 1
    assert "bf16 has no instructions on this CPU" in said[0]
    assert "computing in float32" in said[0]


def test_with_instructions_and_yet_slower_is_float32(machine: Machine, said: list[str]) -> None:
    machine.lacking, machine.milliseconds = ONLY_BF16, half("bf16", 13)
    assert picked("auto", CPU, said) == "off"
    assert said == ["--amp: bf16 measured 0.77x as fast as float32 here; computing in float32"]


@pytest.mark.parametrize(("amp", "lacking"), [("bf16", ONLY_BF16), ("bf16", BOTH), ("fp16", BOTH)])
def test_the_faster_type_is_taken_and_its_gain_is_said(
    machine: Machine, said: list[str], amp: str, lacking: dict[str, str]
) -> None:
    machine.lacking, machine.milliseconds = lacking, half("bf16", 9) | half("fp16", 9) | half(amp, 4)
    assert picked("auto", CPU, said) == amp
    assert said == [f"--amp: {amp} is 2.5x as fast as float32 here (measured); computing in {amp}"]


def test_half_precision_must_beat_float32_by_winograd_where_that_may_be_used(
    machine: Machine, said: list[str]
) -> None:
    machine.lacking = ONLY_BF16
    machine.milliseconds = half("bf16", 7) | {
        "float32, contiguous, Winograd": 5,
        "float32, channels-last, Winograd": 5,
    }
    assert ConvolutionSetting("off", winograd=True) in convolution_settings(()), (
        "the extension is part of this test"
    )
    assert picked("auto", CPU, said) == "off"
    assert picked("auto", CPU, said, winograd=False) == "bf16"


def test_a_draw_is_float32_direct_and_channels_last(machine: Machine) -> None:
    machine.milliseconds = half("bf16", 9.8) | {
        "float32, contiguous": 9.8,
        "float32, contiguous, Winograd": 9.8,
    }
    found = choose(CPU)
    assert (found.amp, found.channels_last, found.winograd) == ("off", True, False)
    machine.forget()
    shutil.rmtree(str(measurements.measurements_folder()))
    machine.milliseconds = {"float32, contiguous": 9.0, "float32, contiguous, Winograd": 8.9}
    assert not choose(CPU, amps=("off",), winograd=False).channels_last


@pytest.mark.parametrize("winograd", [5.0, 20.0])
def test_layout_and_winograd_are_the_fastest_of_those_that_are_open(
    machine: Machine, winograd: float
) -> None:
    machine.milliseconds = {
        "float32, channels-last": 8,
        "float32, channels-last, Winograd": winograd,
        "float32, contiguous, Winograd": winograd,
    }
    full = choose(CPU, amps=("off",))
    assert full.winograd == (winograd < 8)
    assert choose(CPU, amps=("off",), winograd=False).channels_last
    assert not choose(CPU, amps=("off",), channels_last=False, winograd=False).channels_last
    switches = AttackSwitches.fastest(CPU)
    assert (switches.winograd, switches.channels_last) == (full.winograd, full.channels_last)
    assert not AttackSwitches.fastest(CPU, winograd=False).winograd
    assert not AttackSwitches.fastest(CPU, torch.bfloat16).winograd
    assert not AttackSwitches.fastest(CPU, channels_last=False).channels_last


def test_insisting_is_obeyed_with_a_warning_of_the_measured_factor(machine: Machine, said: list[str]) -> None:
    machine.lacking, machine.milliseconds = NEITHER, half("bf16", 150)
    assert picked("bf16", CPU, said) == "bf16"
    assert said == [
        "--amp bf16: bf16 has no instructions on this CPU, convolutions take 15x as long as in float32; "
        "a bare --amp chooses what is fast"
    ]
    assert set(machine.timed) == {"float32, channels-last", "bf16, channels-last"}, "one small layer"


def test_insisting_on_what_is_fast_says_nothing(machine: Machine, said: list[str]) -> None:
    machine.lacking, machine.milliseconds = ONLY_BF16, half("bf16", 5)
    assert picked("bf16", CPU, said) == "bf16"
    assert said == []


@pytest.mark.parametrize("capability_", [(6, 1), (7, 5), (8, 0), (9, 0)])
def test_on_a_gpu_it_is_known(
    monkeypatch: pytest.MonkeyPatch, said: list[str], capability_: tuple[int, int]
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability_)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(choices, "race", lambda *args, **kwargs: pytest.fail("nothing is measured"))
    want = {6: "off", 7: "fp16"}.get(capability_[0], "bf16")
    assert picked("auto", gpu, said) == want
    assert picked("default", gpu, said) == ("bf16" if want == "bf16" else "off")
    said.clear()
    assert picked("bf16", gpu, said) == "bf16"
    assert bool(said) == (want != "bf16")
    assert choose(gpu, amps=("off",)).channels_last


def test_without_amp_the_cpu_computes_in_float32_and_measures_no_precision(
    machine: Machine, said: list[str]
) -> None:
    machine.milliseconds = half("bf16", 1)
    assert picked("default", CPU, said) == "off"
    assert picked("off", CPU, said) == "off"
    assert (said, machine.timed) == ([], [])


def config(**engine: Any) -> TrainConfig[Any]:
    return replace(default_config("madry"), engine=EngineConfig(device="cpu", **engine))


def resolved(**engine: Any) -> EngineConfig:
    info = dataset_info("cifar10")
    assert info is not None
    return resolve(config(**engine), info).engine


def test_the_command_line_stores_what_was_chosen(machine: Machine) -> None:
    machine.lacking, machine.milliseconds = ONLY_BF16, half("bf16", 4) | {"bf16, contiguous": 6}
    assert {flag: BARE[flag][0] for flag in ("--amp", "--compile")} == {"--amp": "auto", "--compile": "auto"}
    fast = resolved(amp="auto")
    assert (fast.amp, fast.channels_last) == ("bf16", "on")
    assert resolved().amp == "off"
    machine.forget()
    machine.lacking = NEITHER
    machine.milliseconds = {"float32, contiguous, Winograd": 11, "float32, channels-last, Winograd": 11}
    slow = resolved(amp="auto")
    assert (slow.amp, slow.channels_last, slow.winograd) == ("off", "on", "off")
    assert resolved(amp="auto", channels_last="on", winograd="on").channels_last == "on"


def test_a_resumed_run_keeps_what_it_began_with_on_another_machine(machine: Machine) -> None:
    machine.lacking, machine.milliseconds = ONLY_BF16, half("bf16", 4)
    begun = resolved(amp="auto")
    machine.forget()
    machine.lacking = NEITHER
    again = with_stored_choices(EngineConfig(device="cpu", amp="auto"), begun)
    assert (again.amp, again.channels_last, again.winograd) == (
        begun.amp,
        begun.channels_last,
        begun.winograd,
    )
    info = dataset_info("cifar10")
    assert info is not None
    # A run of before this was measured has Winograd's algorithm as "auto", and goes on with it.
    old = replace(config(), engine=replace(begun, amp="off", winograd="auto"))
    assert resolve(old, info, carried_on=True).engine == old.engine


def test_configurations_of_earlier_still_open() -> None:
    for amp in ("off", "bf16", "fp16"):
        for mode in ("off", "default", "max-autotune"):
            found = override(
                config(), {"amp": amp, "compile": mode, "winograd": "auto"}, "config.yaml"
            ).engine
            assert (found.amp, found.compile) == (amp, mode)


def test_evaluation_takes_the_fast_precision_too(machine: Machine) -> None:
    machine.lacking, machine.milliseconds = ONLY_BF16, half("bf16", 4)
    assert with_amp_chosen(EvalConfig(amp="auto", device="cpu")).amp == "bf16"
    assert with_amp_chosen(EvalConfig(device="cpu")).amp == "off"
    machine.forget()
    machine.lacking = NEITHER
    assert with_amp_chosen(EvalConfig(amp="auto", device="cpu")).amp == "off"


def test_drop_in_attacks_with_amp(machine: Machine) -> None:
    model, x = tiny_cnn(0), torch.rand(3, 3, 8, 8)
    machine.lacking, machine.milliseconds = ONLY_BF16, half("bf16", 4)
    fast = PGD(model, amp=True, steps=1)
    fast(x, torch.arange(3))
    assert "bfloat16" in fast.path
    machine.forget()
    machine.lacking = NEITHER
    slow = PGD(model, amp=True, steps=1)
    with pytest.warns(
        UserWarning, match="amp=True: bf16 has no instructions on this CPU.* computing in float32"
    ):
        slow(x, torch.arange(3))
    assert "float32" in slow.path
    machine.milliseconds = half("bf16", 150)
    insisted = PGD(model, amp=torch.bfloat16, steps=1)
    with pytest.warns(
        UserWarning, match=r"amp=torch.bfloat16: .*15x as long as in float32; amp=True chooses"
    ):
        insisted(x, torch.arange(3))
    assert "bfloat16" in insisted.path
    assert pick_half(False, CPU) == (None, "")


def test_measurements_are_kept_for_the_next_process(machine: Machine) -> None:
    first = choose(CPU)
    assert machine.timed
    machine.forget()
    assert choose(CPU) == first
    assert machine.timed == []


def test_another_number_of_threads_is_measured_anew(machine: Machine) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        choose(CPU)
        machine.timed.clear()
        torch.set_num_threads(2)
        choose(CPU)
        assert machine.timed
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Uneven(Machine):
    """One thread is faster channels-last, two are faster contiguous: as with ResNet-18 at batch 8."""

    def _passes(self, setting: ConvolutionSetting, layer: Layer, images: int) -> Callable[[], None]:
        def call() -> None:
            self.timed.append(f"{torch.get_num_threads()} {setting.name}")
            self.now += 0.013 if setting.channels_last == (torch.get_num_threads() == 2) else 0.010

        return call


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("free", "share"), [(1, 0.0), (2, 0.2)], ids=["before", "meanwhile"])
def test_threads_that_are_used_are_timed_where_nothing_else_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, share: float
) -> None:
    machine = Uneven(monkeypatch, tmp_path)
    assert choose(CPU, winograd=False).channels_last is False
    assert {name[0] for name in machine.timed} == {"2"}
    # Beside other processes one thread tells the order; it is believed until the process ends, and no longer.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    machine.forget()
    machine.load(monkeypatch, free=free, share=share)
    for _ in range(2):
        assert choose(CPU, winograd=False).channels_last is True
        assert torch.get_num_threads() == 2
    assert sum(name.startswith("1 float32, contiguous") for name in machine.timed) > 0
    machine.forget()
    machine.load(monkeypatch, free=2, share=0.01)
    assert choose(CPU, winograd=False).channels_last is False
    machine.load(monkeypatch, free=free, share=share)
    machine.forget()
    assert choose(CPU, winograd=False).channels_last is False, "what was measured undisturbed is kept"
    assert machine.timed == []


def test_free_cores_and_other_load_are_those_of_this_machine() -> None:
    cores = os.cpu_count() or 1
    assert free_cores() <= cores
    load = OtherLoad()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.1:
        pass
    share = load.share()
    assert share is None or 0.0 <= share <= 1.0


def test_another_instruction_set_is_measured_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(CPU)
    machine.timed.clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    choose(CPU)
    assert machine.timed


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "nan": lambda text: text.replace('"seconds": {', '"seconds": {"float32, contiguous": NaN, "x": '),
    "negative": lambda text: json.dumps(
        json.loads(text) | {"seconds": dict.fromkeys(json.loads(text)["seconds"], -1.0)}
    ),
    "words": lambda text: json.dumps(
        json.loads(text) | {"seconds": dict.fromkeys(json.loads(text)["seconds"], "fast")}
    ),
    "other key": lambda text: json.dumps(json.loads(text) | {"key": {}}),
    "other names": lambda text: json.dumps(json.loads(text) | {"seconds": {"float32": 1.0}}),
    "large": lambda text: text + " " * (1 << 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_measured_again(machine: Machine, damage: str) -> None:
    first, folder = choose(CPU), measurements.measurements_folder()
    assert folder is not None
    (file,) = folder.iterdir()
    file.write_text(DAMAGES[damage](file.read_text()))
    machine.forget()
    assert choose(CPU) == first
    assert machine.timed
    machine.forget()
    assert choose(CPU) == first
    assert machine.timed == [], "and replaced"


@pytest.mark.parametrize("obstacle", ["file", "no home", "read-only"])
def test_a_cache_that_cannot_be_written_fails_nothing(
    machine: Machine, obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "file":
        (tmp_path / "cache").write_text("not a folder")
    elif obstacle == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home() -> Path:
            raise RuntimeError("no home directory")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert choose(CPU).amp == "off"
    machine.forget()
    assert choose(CPU).amp == "off"
    assert machine.timed, "measured by each process"


SAVE_OFTEN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("store", sys.argv[1])
store = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)
number = float(sys.argv[2])
for _ in range(200):
    store.save_seconds({"what": "both"}, {"a": number, "b": number})
    found = store.load_seconds({"what": "both"}, {"a", "b"})
    assert found is not None and found["a"] == found["b"]
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SAVE_OFTEN, str(measurements.__file__)]
    both = [subprocess.Popen([*command, number], env=environment) for number in "12"]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(list((tmp_path / "fastdynat" / "measured").iterdir())) == 1, "nothing half-written is left"


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


def taking(clock: list[float], seconds: Callable[[int], float], calls: list[int]) -> Callable[[], None]:
    def call() -> None:
        calls.append(1)
        clock[0] += seconds(len(calls))

    return call


def test_a_race_takes_the_least_of_several_rounds_and_leaves_the_hopeless_alone(clock: list[float]) -> None:
    good, close, bad = [], [], list[int]()
    found = race(
        {
            "good": taking(clock, lambda n: 0.1 if n == 3 else 0.11, good),
            "close": taking(clock, lambda n: 0.15, close),
            "bad": taking(clock, lambda n: 0.5, bad),
        },
        clock=lambda: clock[0],
    )
    assert found == pytest.approx({"good": 0.1, "close": 0.15, "bad": 0.5})
    assert len(bad) == 2, "warmed up, timed once"
    assert len(good) == len(close) >= 4


def test_a_candidate_that_is_a_hundred_times_slower_is_called_once(clock: list[float]) -> None:
    good, awful = list[int](), list[int]()
    found = race(
        {"good": taking(clock, lambda n: 0.01, good), "awful": taking(clock, lambda n: 5.0, awful)},
        clock=lambda: clock[0],
    )
    assert found["awful"] == pytest.approx(5.0)
    assert len(awful) == 1


def test_a_race_ends_after_its_seconds(clock: list[float]) -> None:
    one, other = list[int](), list[int]()
    race(
        {"one": taking(clock, lambda n: 0.2, one), "other": taking(clock, lambda n: 0.2, other)},
        clock=lambda: clock[0],
    )
    assert clock[0] < 2.5
    assert len(one) >= 4


def test_other_processes_do_not_advance_the_clock_of_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        clock = quiet_clock()
        begin, wall = clock(), time.perf_counter()
        time.sleep(0.2)  # as good as another process's turn
        assert clock() - begin < 0.1 < time.perf_counter() - wall
        torch.set_num_threads(2)
        assert quiet_clock() is time.perf_counter
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("setting", convolution_settings(("bf16",)), ids=lambda s: s.name)
def test_what_is_timed_computes_the_same_in_every_setting(setting: ConvolutionSetting) -> None:
    state = torch.get_rng_state()
    found, want = passes(setting)(), passes(ConvolutionSetting())()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(found, torch.Tensor)
    assert isinstance(want, torch.Tensor)
    difference = (found.double() - want.double()).norm() / want.double().norm()
    assert difference < (0.2 if setting.amp == "bf16" else 1e-3), "a rounded ReLU opens or shuts now and then"


def test_this_machine_end_to_end() -> None:
    found = choose(CPU)
    assert found.amp == "off" or not capability.half_types(CPU)[found.amp]
    for name, seconds, remark in choice_table(CPU):
        assert remark
        assert seconds is None or 0 < seconds < 10, name
    assert slower_than_float32("bf16", CPU) > 0
    assert processor(CPU)["threads"] == torch.get_num_threads()


def test_the_processor_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: EPYC\n"
        "flags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\n"
    )
    assert capability._cpu_info(file) == ("AuthenticAMD EPYC", {"fpu", "avx2", "avx512_bf16"})
    assert capability._cpu_info(tmp_path / "none")[1] == set()


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ({"avx2", "avx512f"}, False),  # oneDNN emulates bf16 there, and says that it is supported
        ({"avx2", "avx512f", "avx512_bf16"}, True),
        ({"avx512f", "amx_bf16"}, True),
        ({"asimd", "bf16"}, True),
        (set(), True),  # a system without the file: oneDNN's word stands
    ],
)
def test_bf16_that_is_only_emulated_is_lacking(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], has: bool
) -> None:
    monkeypatch.setattr(capability, "_cpu_info", lambda: ("", flags))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert capability.half_types(CPU)["bf16"] == ("" if has else "bf16 has no instructions on this CPU")
    for limit, emulated in (("AVX512_CORE_VNNI", True), ("AVX512_CORE_BF16", False)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert (capability.half_types(CPU)["bf16"] == "") is (has and not emulated)
