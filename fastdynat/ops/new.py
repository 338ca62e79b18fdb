"""``python -m fastdynat.ops.new NAME``: the files of a new operator, with a tested example."""

import keyword
import re
import sys
from pathlib import Path
from string import Template

from fastdynat.errors import UserError
from fastdynat.ops import operator_templates

ROOT = Path(__file__).parents[2]
FILES = {
    "fastdynat/ops/{name}.py": operator_templates.OPS,
    "kernels/{name}.py": operator_templates.TRITON,
    "csrc/{name}.h": operator_templates.HEADER,
    "csrc/{name}.cpp": operator_templates.CPP,
    "csrc/cuda/{name}.cu": operator_templates.CUDA,
    "fastdynat/ops/checks/{name}_cases.py": operator_templates.CASES,
    "tests/ops/test_{name}.py": operator_templates.TEST,
}
IMPORTED = {"torch", "triton", "tl", "ops", "checks", "partial", *sys.stdlib_module_names}  # by the templates
PUBLIC, CHECKS = "fastdynat/ops/__init__.py", "fastdynat/ops/checks/__init__.py"
NEXT = """next:
  1. python -m pytest tests/ops/test_{name}.py          the example passes
  2. replace the example: fastdynat/ops/{name}.py first, then its cases and its test, then the kernels; the
     schema is inferred from `_eager`, and the C++ functions and the Triton launcher take the same arguments
  3. pip install -e . --no-build-isolation             builds csrc/ with the new kernels
  4. fastdynat doctor --check                          compares every implementation on this machine
  5. add calls to tests/support/sanitized_calls.py and tests/support/triton_launches.py
  6. ruff check --fix . && ruff format . && mypy"""


def check_operator_name(name: str, root: Path) -> None:
    """Raise UserError where `name` cannot be a new operator in the checkout `root`."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise UserError(f"operator name {name!r}: use lower-case words and underscores, as scale_pixels")
    if not (root / "csrc").is_dir() or not (root / "kernels").is_dir():
        raise UserError(f"{root} has no csrc/ and kernels/: run this in a checkout of the repository")
    for file in (file.format(name=name) for file in FILES):
        if (root / file).exists():
            raise UserError(f"operator name {name!r} is taken: {file} exists; choose another")
    public = (root / PUBLIC).read_text(encoding="utf-8")
    if f'"{name}"' in public or (root / PUBLIC).with_name(name).exists() or name in IMPORTED:
        raise UserError(f"operator name {name!r} is taken by a name in fastdynat.ops; choose another")


def add_operator(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of operator `name` into the checkout `root`; returns all files that changed."""
    check_operator_name(name, root)
    class_name = "".join(word.title() for word in name.split("_")) + "Op"
    written = []
    for file, template in FILES.items():
        path = root / file.format(name=name)
        path.write_text(Template(template).substitute(name=name, Class=class_name), encoding="utf-8")
        written.append(path)
    _add_import(root / PUBLIC, f"from fastdynat.ops.{name} import {name}", name)
    _add_case_module(root / CHECKS, f"{name}_cases")
    return [*written, root / PUBLIC, root / CHECKS]


def _add_import(path: Path, line: str, name: str) -> None:
    """Insert import `line` and the `__all__` entry `name`, both in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    imports = [n for n, text in enumerate(lines) if text.startswith("from fastdynat.ops.")]
    lines.insert(next((n for n in imports if lines[n] > line), imports[-1] + 1), line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _add_entry(path, "__all__ = [", f'    "{name}",')


def _add_case_module(path: Path, module: str) -> None:
    _add_entry(path, "from fastdynat.ops.checks import (", f"    {module},")
    _add_entry(path, "__all__ = [", f'    "{module}",')


def _add_entry(path: Path, opening: str, entry: str) -> None:
    """Insert the line `entry` into the list that line `opening` begins, which is sorted as ruff sorts it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines.index(opening) + 1
    last = next(n for n in range(first, len(lines)) if lines[n] in ("]", ")"))
    is_later = (n for n in range(first, last) if lines[n].strip(' ",').islower() and lines[n] > entry)
    lines.insert(next(is_later, last), entry)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_command(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m fastdynat.ops.new NAME", file=sys.stderr)
        return 2
    try:
        files = add_operator(arguments[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for path in files:
        print(path.relative_to(ROOT))
    print(NEXT.format(name=arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
