"""Judgement of a lap: accuracies by the evaluator of `fastdynat eval`, and signs of masked gradients."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.commands.evaluate.cells import Cells
from fastdynat.commands.evaluate.settle import EvalConfig, check_eval_device
from fastdynat.commands.evaluate.targets import Planner, Target, TestSets
from fastdynat.commands.speedrun.race_rules import EPS, SAMPLE, SAMPLE_SEED, STEP_SIZE
from fastdynat.data.read_ahead import pixel_digest
from fastdynat.data.split import stratified_split
from fastdynat.evaluation.masking import check_masking
from fastdynat.evaluation.measure import exact_float32
from fastdynat.evaluation.outcome import unpack_bits
from fastdynat.execution.process_state import process_state_kept
from fastdynat.ops import use_backend
from fastdynat.terminal.progress import ProgressDisplay

ATTACKS = ("clean", "pgd20", "fast-autoattack")  # the last on the sample only
SHOWN = ("accuracy", "ci", "correct", "seconds", "batch_size")


@dataclass(frozen=True)
class LapJudge:
    """Evaluates laps on the test images of `data`, which it reads once.

    Attributes:
        tests: test sets that were read.
    """

    data: str
    data_dir: str
    device: str
    tests: TestSets
    display: ProgressDisplay

    @process_state_kept()
    def judge(self, weights: Path, kept: Path, *, quick: bool = False) -> dict[str, Any]:
        """The verdicts on the network in the file `weights`, as plain values; `kept` holds measurements.

        Keys: `test`, all images; `sample`, class-stratified ones under AutoAttack, with `gap`, PGD-20's
        accuracy on them less AutoAttack's; `masking`, the checks of masked gradients on the sample. Both are
        None where it is to be `quick`.

        Raises:
            UserError: weights or data that cannot be used.
        """
        config = EvalConfig(
            attacks=",".join(ATTACKS),
            norm="linf",
            eps=EPS,
            step_size=STEP_SIZE,
            data=self.data,
            data_dir=self.data_dir,
            device=self.device,
            cache=str(kept),
        )
        device = check_eval_device(config)
        (target,) = Planner(config, self.tests).plan([weights])
        with exact_float32(), use_backend(config.kernels):
            network = target.network.to(device).requires_grad_(False)
            cells = self._cells(target, network, config, device)
            clean, pgd = cells.cell(target.columns[0]), cells.cell(target.columns[1])
            found: dict[str, Any] = {"test": _of_all(target, clean, pgd), "sample": None, "masking": None}
            return found if quick else found | self._on_sample(target, network, config, device, pgd)

    def _cells(self, target: Target, network: nn.Module, config: EvalConfig, device: torch.device) -> Cells:
        display = self.display
        return Cells(target, network, config, device, known={}, display=display, should_stop=lambda: False)

    def _on_sample(
        self,
        target: Target,
        network: nn.Module,
        config: EvalConfig,
        device: torch.device,
        pgd: dict[str, Any],
    ) -> dict[str, Any]:
        rows = sample_rows(target.everything.labels)
        images = target.everything.part(rows)
        part = replace(target, name=f"{target.name} sample", everything=images, digest=pixel_digest(images))
        autoattack = self._cells(part, network, config, device).cell(part.columns[2])
        standing = unpack_bits(pgd["robust_bits"], len(target.everything))[rows]
        share = int(standing.sum()) / len(rows)
        sample = {
            "images": len(rows),
            "pgd20": share,
            "autoattack": _shown(autoattack),
            "gap": round(share - autoattack["accuracy"], 6),
        }
        return {"sample": sample, "masking": self._masking(part, config, device)}

    def _masking(self, part: Target, config: EvalConfig, device: torch.device) -> list[dict[str, Any]]:
        with self.display.task(f"{part.name} checks", len(part.images), unit="images") as task:
            report = check_masking(
                part.network,
                part.images,
                norm=part.radius.norm,
                eps=part.radius.eps,
                device=device,
                batch_size=config.batch_size,
                seed=config.seed,
                advance=task.advance,
            )
        return [asdict(check) for check in report.checks]


def sample_rows(labels: Tensor) -> Tensor:
    """Numbers of the images under AutoAttack: `SAMPLE`, as many of each class; of fewer images all."""
    if len(labels) <= SAMPLE:
        return torch.arange(len(labels))
    _, sample = stratified_split(labels, val_size=SAMPLE, limit=None, seed=SAMPLE_SEED)
    return sample


def _of_all(target: Target, clean: dict[str, Any], pgd: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": len(target.everything),
        "classes": target.info.num_classes,
        "sha256": target.digest,
        "clean": _shown(clean),
        "pgd20": _shown(pgd),
    }


def _shown(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in SHOWN}
