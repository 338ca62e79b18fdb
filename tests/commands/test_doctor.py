"""`fastdynat doctor`: missing parts, the reasons and the remedies."""

import json
from typing import Any

import pytest
import torch
from conftest import needs

from fastdynat.commands.doctor import machine_report as doctor

NAMES = [
    "Python",
    "torch",
    "torchvision",
    "CUDA device",
    "bf16 / tensor cores",
    "Triton",
    "C++ extension",
    "C++ compiler",
    "nvcc",
    "DALI",
    "torch.compile",
    "TensorBoard",
    "timm",
    "datasets",
    "processor",
    "--amp",
    "without --amp",
]


def by_name(**kwargs: Any) -> dict[str, doctor.MachineCheck]:
    return {check.name: check for check in doctor.check_machine(**kwargs)}


def test_reports_every_component_with_a_reason_and_a_remedy() -> None:
    checks = doctor.check_machine()
    timings = [check for check in checks if check.name.startswith("time: ")]
    assert [check.name for check in checks] == [*NAMES, *(check.name for check in timings)]
    assert {"time: float32, contiguous", "time: float32, channels-last"} <= {check.name for check in timings}
    for check in checks:
        assert check.detail
        assert check.status in doctor.STYLES
        assert check.remedy or check.status == "ok", check


def test_says_plainly_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = by_name()
    assert found["CUDA device"].status == "missing"
    assert "CUDA_VISIBLE_DEVICES" in found["CUDA device"].remedy
    assert found["bf16 / tensor cores"].status == "missing"
    assert doctor.report_machine(json=False) == 0
    assert "no GPU is usable here" in " ".join(capsys.readouterr().out.split())


def test_a_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = by_name()
    assert found["torch"].status == "warn"
    assert found["CUDA device"].detail == "none: this torch is built without CUDA"


def test_without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for variable in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    found = by_name(try_compile=True)
    assert found["C++ compiler"].status == "missing"
    assert found["nvcc"].status == "warn"
    assert found["torch.compile"].status == "missing"
    assert "needs C++ compiler" in found["torch.compile"].detail
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert by_name()["C++ compiler"].detail == "CXX=no-such-compiler not found"


def test_missing_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    found = by_name()
    assert found["Triton"].status == found["torchvision"].status == "missing"
    assert found["DALI"].remedy == "pip install 'fastdynat[dali]'"


@pytest.mark.slow
@needs("cxx")
def test_compile_really_compiles() -> None:
    assert by_name(try_compile=True)["torch.compile"].status == "ok"


@needs("cxx")
def test_compile_is_tried_and_its_failure_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    assert by_name(try_compile=True)["torch.compile"].detail == "compiled and ran a function on cpu"
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: torch.zeros_like)
    assert by_name(try_compile=True)["torch.compile"].status == "warn"
    monkeypatch.setattr(torch, "compile", broken)
    assert by_name(try_compile=True)["torch.compile"].detail == "failed on cpu: RuntimeError: no such thing"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.report_machine(json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows if not row["name"].startswith("time: ")] == NAMES
    assert set(rows[0]) == {"name", "status", "detail", "remedy"}
