"""Every script in examples/ runs, in a folder of its own, and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "01_train_and_evaluate": ("best epoch", "pgd20", "worst case over the attacks", "small after"),
    "02_own_network_and_data": ("pgd20", "loaded from runs/example-02: clean accuracy"),
    "03_drop_in_losses": ("epoch 4: loss", "pgd20"),
    "04_new_method": ("04_new_method.py:Squeeze, 2 epochs", "pgd20"),
    "05_new_attack": ("Decaying", "PGD-20 leaves"),
    "06_check_your_attack": ("adversarially trained: ", "black box: ", "Fidelity("),
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for text in PRINTED[name]:
        assert text in done.stdout
