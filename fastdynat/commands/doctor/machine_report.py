"""The report of `fastdynat doctor`: what this machine can use, and the reason and remedy for the rest."""

import importlib.util
import json as json_module
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from fastdynat.execution.compiling import quiet_about_cuda
from fastdynat.machine.capability import half_types, processor
from fastdynat.tuning import choice_table, choose

Status = Literal["ok", "warn", "missing"]
STYLES = {"ok": "green", "warn": "yellow", "missing": "red"}
NO_GPU = "no CUDA device"


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """One line of the report. `remedy` is empty where nothing needs to be done."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def check_machine(*, try_compile: bool = False) -> list[MachineCheck]:
    """Every check, in the order of the report. Never raises for something that is missing.

    try_compile: also compile a tiny function with torch.compile and run it (seconds; tens of seconds when
    cold).
    """
    return [
        _python(),
        _torch(),
        _torchvision(),
        _cuda_device(),
        _tensor_cores(),
        _triton(),
        _extension(),
        _cxx_compiler(),
        _nvcc(),
        _dali(),
        _compile(try_compile),
        _optional(
            "TensorBoard", "tensorboard", "tensorboard", "TensorBoard logs; the other logs do not need it"
        ),
        _optional("timm", "timm", "timm", "models from timm; the built-in models do not need it"),
        _optional("datasets", "datasets", "datasets", "--data hf:NAME_OR_FOLDER; other data do not need it"),
        *_decisions(),
    ]


def _python() -> MachineCheck:
    return MachineCheck("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _torch() -> MachineCheck:
    cuda = torch.version.cuda
    if cuda is None:
        remedy = (
            "for training on a GPU install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        )
        return MachineCheck("torch", "warn", f"{torch.__version__}, built without CUDA", remedy)
    return MachineCheck("torch", "ok", f"{torch.__version__}, built for CUDA {cuda}")


def _torchvision() -> MachineCheck:
    found = _version("torchvision")
    if found is None:
        return MachineCheck("torchvision", "missing", "not installed", "pip install torchvision")
    return MachineCheck("torchvision", "ok", found)


def _cuda_device() -> MachineCheck:
    name = "CUDA device"
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return MachineCheck(
            name, "ok", "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in seen)
        )
    if torch.version.cuda is None:
        return MachineCheck(
            name, "missing", "none: this torch is built without CUDA", "install a CUDA build of torch"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return MachineCheck(
            name, "missing", "none: CUDA_VISIBLE_DEVICES hides them all", "unset CUDA_VISIBLE_DEVICES"
        )
    driver = shutil.which("nvidia-smi")
    why = "torch cannot use the driver" if driver else "no NVIDIA driver found (nvidia-smi is not on PATH)"
    remedy = (
        f"run nvidia-smi and install a driver for CUDA {torch.version.cuda}; until then "
        "everything runs on the CPU"
    )
    return MachineCheck(name, "missing", f"none: {why}", remedy)


def _tensor_cores() -> MachineCheck:
    name = "bf16 / tensor cores"
    if not torch.cuda.is_available():
        lacking = half_types(torch.device("cpu"))["bf16"]
        return MachineCheck(
            name,
            "missing",
            f"{NO_GPU}; {lacking or 'this CPU has bf16 instructions'}",
            "use a GPU of Ampere or newer",
        )
    capability = torch.cuda.get_device_capability()
    detail = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return MachineCheck(name, "warn", f"{detail}: no bf16 tensor cores", "train with float32 on this GPU")
    return MachineCheck(name, "ok", detail)


def _triton() -> MachineCheck:
    name = "Triton"
    found = _version("triton")
    if found is None:
        return MachineCheck(name, "missing", "not installed", "pip install triton")
    if os.environ.get("TRITON_INTERPRET"):
        return MachineCheck(
            name, "warn", f"{found}, interpreting kernels (TRITON_INTERPRET is set)", "unset TRITON_INTERPRET"
        )
    if not torch.cuda.is_available():
        return MachineCheck(
            name, "warn", f"{found}, cannot run kernels here: {NO_GPU}", "TRITON_INTERPRET=1 to debug them"
        )
    return MachineCheck(name, "ok", found)


def _extension() -> MachineCheck:
    name = "C++ extension"
    try:
        from fastdynat import ops  # raises where the extension is broken, which is a finding here
    except ImportError as error:
        return MachineCheck(name, "missing", str(error), "pip install -e . --no-build-isolation")
    backends = ops.available_backends()
    if backends["cpp"] is not None:
        return MachineCheck(
            name, "warn", f"{backends['cpp']}; eager operators are used", "install a C++ compiler, reinstall"
        )
    if backends["cuda"] is None:
        return MachineCheck(name, "ok", "loaded, with its CUDA half")
    return MachineCheck(name, "ok", f"loaded; its CUDA half is not usable: {backends['cuda']}")


def _cxx_compiler() -> MachineCheck:
    name = "C++ compiler"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        detail = (
            f"CXX={compiler} not found" if compiler else "none on PATH; torch.compile on the CPU needs one"
        )
        return MachineCheck(name, "missing", detail, "apt-get install g++ (or conda install cxx-compiler)")
    return MachineCheck(name, "ok", f"{compiler}: {_first_line([compiler, '--version'])}")


def _nvcc() -> MachineCheck:
    name = "nvcc"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None)
    if nvcc is None:
        remedy = "optional, only to build the extension's CUDA half: install the CUDA toolkit"
        return MachineCheck(name, "warn", "not on PATH and not under CUDA_HOME", remedy)
    lines = _output([nvcc, "--version"])
    release = next((line.strip() for line in lines if "release" in line), "version unknown")
    return MachineCheck(name, "ok", f"{nvcc}: {release}")


def _compile(try_it: bool) -> MachineCheck:
    name = "torch.compile"
    if sys.platform != "linux":
        return MachineCheck(name, "warn", f"not tested on {sys.platform}", "run with compilation off")
    needed = _triton() if torch.cuda.is_available() else _cxx_compiler()
    if needed.status != "ok":
        return MachineCheck(name, "missing", f"needs {needed.name}: {needed.detail}", needed.remedy)
    if not try_it:
        return MachineCheck(name, "ok", f"its compiler is there ({needed.name}); not tried")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quiet_about_cuda()
    try:
        x = torch.linspace(0, 1, 8, device=device)
        same = torch.equal(torch.compile(_tiny, fullgraph=True)(x), _tiny(x))
    except Exception as error:  # whatever goes wrong in there is the finding
        return MachineCheck(
            name, "missing", f"failed on {device}: {_one_line(error)}", "run with compilation off"
        )
    if not same:
        return MachineCheck(
            name, "warn", f"compiles on {device}, but the result differs", "run with compilation off"
        )
    return MachineCheck(name, "ok", f"compiled and ran a function on {device}")


def _decisions() -> list[MachineCheck]:
    """The choices of --amp, --channels-last auto and --winograd auto here, with the timings behind them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found, full = choose(device), choose(device, amps=("off",))
        rows = choice_table(device)
    except (ImportError, RuntimeError) as error:
        return [
            MachineCheck("precision", "warn", f"cannot be measured: {_one_line(error)}", "leave --amp out")
        ]
    amp = "float32" if found.amp == "off" else found.amp
    last = {True: "channels-last", False: "contiguous"}
    checks = [
        MachineCheck("processor", "ok", _processor(device)),
        MachineCheck("--amp", "ok", f"{amp}, {last[found.channels_last]}: {found.why}"),
        MachineCheck(
            "without --amp",
            "ok",
            f"{last[full.channels_last]}, Winograd's algorithm {'on' if full.winograd else 'off'}",
        ),
    ]
    for name, seconds, remark in rows:
        detail = remark if seconds is None else f"{1000 * seconds:.2f} ms, {remark}"
        checks.append(MachineCheck(f"time: {name}", "ok", detail))
    return checks


def _processor(device: torch.device) -> str:
    found = processor(device)
    parts = [found["model"], " ".join(found["flags"])]
    parts += [f"{found['threads']} thread(s)"] if "threads" in found else []
    parts += [f"{name}={value}" for name, value in found.get("environment", {}).items()]
    return "; ".join(part for part in parts if part)


def _tiny(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).clamp(0, 1)


def _optional(name: str, distribution: str, extra: str, purpose: str) -> MachineCheck:
    found = _version(distribution)
    if found is None:
        return MachineCheck(name, "warn", f"not installed: no {purpose}", f"pip install 'fastdynat[{extra}]'")
    return MachineCheck(name, "ok", found)


def _dali() -> MachineCheck:
    check = _optional(
        "DALI", "nvidia-dali-cuda130", "dali", "GPU image decoding; the built-in loaders are used instead"
    )
    if check.status != "ok":
        return check
    try:
        importlib.import_module("fastdynat.data.dali_loader")
    except (ImportError, OSError) as error:
        return MachineCheck(
            "DALI",
            "warn",
            f"{check.detail}, cannot be used: {_one_line(error)}",
            "pip install 'fastdynat[dali]'",
        )
    return check


def _version(distribution: str) -> str | None:
    """The version of an installed and importable distribution, or None."""
    module = {"nvidia-dali-cuda130": "nvidia.dali"}.get(distribution, distribution)
    try:
        found = version(distribution)
        return found if importlib.util.find_spec(module) else None
    except (
        PackageNotFoundError,
        ModuleNotFoundError,
        ValueError,
    ):  # find_spec raises where a parent is missing
        return None


def _output(command: list[str]) -> list[str]:
    """The lines a command prints; its error as one line where it does not run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [_one_line(error)]


def _first_line(command: list[str]) -> str:
    return next(iter(_output(command)), "prints nothing")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def machine_json(checks: list[MachineCheck]) -> str:
    """The report as a JSON list of objects with name, status, detail and remedy."""
    return json_module.dumps([asdict(check) for check in checks], indent=2)


def print_machine(checks: list[MachineCheck]) -> None:
    """Print the report as a table, and one line that says where training would run."""
    from rich import box
    from rich.text import Text

    from fastdynat.terminal.consoles import AS_IS, PlainTable, output_console

    table = PlainTable(box=box.SIMPLE)
    for column in ("", "what", "found", "remedy"):
        table.add_column(column, overflow="fold")  # remedies are commands: never cut them short
    for check in checks:
        status = Text(check.status, style=STYLES[check.status])
        table.add_row(status, check.name, check.detail, check.remedy)
    console = output_console()
    console.print(table)
    gpu = next(check for check in checks if check.name == "CUDA device")
    place = (
        f"on {gpu.detail}"
        if gpu.status == "ok"
        else "on the CPU, which is slow but works: no GPU is usable here"
    )
    console.print(f"Training runs {place}.", **AS_IS)


def report_machine(*, json: bool, try_compile: bool = False) -> int:
    """Print the report as JSON or a table. Returns the exit code 0: missing parts are no failures."""
    checks = check_machine(try_compile=try_compile)
    if json:
        print(machine_json(checks))
    else:
        print_machine(checks)
    return 0
