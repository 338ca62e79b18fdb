"""The export of one checkpoint of a run to a file."""

import logging
from dataclasses import replace
from pathlib import Path

from torch import nn

from fastdynat.commands.export.accuracies import stored_accuracies
from fastdynat.commands.export.export_config import ExportConfig
from fastdynat.commands.export.exported_file import exported_file, refuse_file_options
from fastdynat.commands.export.programs import check_onnx, write_onnx, write_torch
from fastdynat.commands.export.robustbench import THREATS, check_model_name, side_files, write_robustbench
from fastdynat.errors import UserError
from fastdynat.execution.process_state import process_state_kept
from fastdynat.methods.configs import stored_config
from fastdynat.runs import Sidecar, check_output, find_checkpoint, load_checkpoint, require_run
from fastdynat.runs.atomic_files import replacing

logger = logging.getLogger(__name__)

SUFFIXES = {"robustbench": ".pt", "torch": ".pt2", "onnx": ".onnx"}


@process_state_kept()
def export_run(run: Path | str, config: ExportConfig) -> Path:
    """Write the file, read it back, compare its logits with the network's on random images, then keep it.

    Raises: UserError for a run, a file or a network that this cannot be done with; nothing was written then.
    """
    run = Path(run)
    out = Path(config.out)
    _check_out(out, config)
    model, sidecar, weights = exported_file(run, config) if run.is_file() else _checkpoint(run, config)
    with replacing(out) as path:
        if config.format == "robustbench":
            difference = _write_robustbench(run, model, sidecar, weights, path, config)
        else:
            write = write_torch if config.format == "torch" else write_onnx
            difference = write(model, sidecar.image_shape, path)
    logger.info(
        "%s: read back, its logits differ by at most %.1e on random images, in batches of 1 and 5",
        out,
        difference,
    )
    return out


def _check_out(out: Path, config: ExportConfig) -> None:
    suffix = SUFFIXES[config.format]
    if out.suffix != suffix:
        raise UserError(f"--out of --format {config.format} must end in {suffix}, got {config.out!r}")
    files: tuple[Path, ...] = (out,)
    if config.format == "robustbench":
        check_model_name(out)
        files += side_files(out)
    if config.format == "onnx":
        check_onnx()
    for path in files:
        if path.exists() and not config.overwrite:
            raise UserError(f"{path} exists; choose another --out, or replace it with --overwrite")
        check_output(path)


def _checkpoint(run: Path, config: ExportConfig) -> tuple[nn.Module, Sidecar, str]:
    """The network of a run's checkpoint, what is known about it, and the sha256 of its weights."""
    refuse_file_options(run, config)
    require_run(run)
    checkpoint = config.checkpoint
    if find_checkpoint(run, checkpoint) is None:
        raise UserError(f"{run} has no {checkpoint} checkpoint; use the other --checkpoint, or train on")
    network, sidecar, weights = load_checkpoint(run, checkpoint)
    return network.requires_grad_(False), sidecar, weights


def _write_robustbench(
    run: Path,
    model: nn.Module,
    sidecar: Sidecar,
    weights: str,
    path: Path,
    config: ExportConfig,
) -> float:
    if sidecar.norm not in THREATS:
        raise UserError(f"RobustBench has no threat model for {sidecar.norm}: use --format torch")
    accuracies = stored_accuracies(
        run if run.is_dir() else Path(),  # results of a file lie in ./evaluations
        weights,
        dataset=sidecar.dataset,
        norm=sidecar.norm,
        eps=sidecar.eval_eps,
    )
    logger.info(accuracies.note)
    dataset = sidecar.dataset if config.dataset == "auto" else config.dataset
    paper = replace(config.paper, additional_data=config.paper.additional_data or _has_extra_images(run))
    return write_robustbench(
        model, sidecar, path, Path(config.out), dataset=dataset, paper=paper, accuracies=accuracies
    )


def _has_extra_images(run: Path) -> bool:
    """True if `run` trained on images beyond its data set's; a file of weights does not say so."""
    if run.is_file():
        return False
    extra = stored_config(run).extra
    return extra.extra_data is not None and extra.extra_share > 0
