"""A RobustBench submission: weights that its loader reads unchanged, the architecture's source, and the
`model_info` entry.
"""

import json
from collections.abc import Callable
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat import __version__
from fastdynat.commands.export.accuracies import Accuracies
from fastdynat.commands.export.export_check import largest_difference
from fastdynat.commands.export.export_config import Paper
from fastdynat.commands.export.network_source import architecture_source
from fastdynat.errors import UserError
from fastdynat.runs import Sidecar
from fastdynat.runs.atomic_files import replacing, saving

THREATS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
CUT = ("module.", "model.")  # robustbench/utils.py: rm_substr_from_state_dict, wherever in a key these stand
HEADER = '''"""{name}: {architecture}, {dataset}, {threat}, for RobustBench.

Written by fastdynat {version} (MIT licence).

To add it to robustbench:
1. Copy this file to robustbench/model_zoo/architectures/{name}.py.
2. In robustbench/model_zoo/{dataset}.py write
       from robustbench.model_zoo.architectures.{name} import build as {name}
   and in the dictionary of ThreatModel.{threat}
       ("{name}", {{"model": {name}, "gdrive_id": "<id of {name}.pt on Google Drive>"}}),
3. Copy {name}.json to model_info/{dataset}/{threat}/. A {name}.pt in models/{dataset}/{threat}/ saves the
   download.
"""
'''


def side_files(path: Path) -> tuple[Path, Path]:
    """The `model_info` JSON and the Python source that lie beside the weights at `path`."""
    return path.with_suffix(".json"), path.with_suffix(".py")


def check_model_name(path: Path) -> None:
    """Raise UserError for file names that cannot be a RobustBench model's, which is a Python module's too."""
    if not path.stem.isidentifier() or iskeyword(path.stem):
        raise UserError(
            f"{path.name}: RobustBench calls the model {path.stem!r}; use letters, digits and _, as "
            "Rice2020Overfitting"
        )


def check_keys(state: dict[str, Tensor]) -> None:
    """Raise UserError for a key that RobustBench's loader would change."""
    for key in state:
        if cut := next((word for word in CUT if word in key), None):
            raise UserError(
                f"RobustBench's loader cuts keys that contain {cut!r}, and this network has {key!r}: use "
                "--format torch"
            )


def write_robustbench(
    model: nn.Module,
    sidecar: Sidecar,
    path: Path,
    final: Path,
    *,
    dataset: str,
    paper: Paper,
    accuracies: Accuracies,
) -> float:
    """Write the weights to `path`, and beside `final`, where they will be, the `model_info` JSON and the
    source.

    Returns the largest difference of the logits, after the source was run and the weights were read by it.
    """
    state = dict(model.state_dict())
    check_keys(state)
    threat = THREATS[sidecar.norm]
    names = {"name": final.stem, "architecture": sidecar.architecture, "dataset": dataset, "threat": threat}
    shape = sidecar.image_shape
    code = architecture_source(
        sidecar.architecture,
        num_classes=sidecar.num_classes,
        image_shape=shape,
        mean=sidecar.mean,
        std=sidecar.std,
    )
    with saving(path, needed=sum(tensor.nbytes for tensor in state.values())) as file:
        torch.save({"state_dict": state}, file)
    difference = largest_difference(model, _read_again(code, path), shape)
    info, source = side_files(final)
    entry = (
        json.dumps(model_info(sidecar, dataset=dataset, paper=paper, accuracies=accuracies), indent=2) + "\n"
    )
    with replacing(source) as new_source, replacing(info) as new_info:  # both, or neither
        new_source.write_text(HEADER.format(version=__version__, **names) + "\n" + code, encoding="utf-8")
        new_info.write_text(entry, encoding="utf-8")
    return difference


def _read_again(code: str, path: Path) -> Callable[[Tensor], Tensor]:
    namespace: dict[str, Any] = {"__name__": path.stem}
    exec(compile(code, str(path.with_suffix(".py")), "exec"), namespace)
    network: nn.Module = namespace["build"]()
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return network.eval()


def model_info(sidecar: Sidecar, *, dataset: str, paper: Paper, accuracies: Accuracies) -> dict[str, Any]:
    """The entry of RobustBench's `model_info`, all fields; None for unmeasured numbers and missing texts.

    Accuracies are percentages as text, as in the published entries. `reported` is what the paper will say: by
    default our own AutoAttack result. The footnote ends with the number of images and, where it was ours, the
    implementation of AutoAttack. `unreliable` is for
    RobustBench's maintainers to set.
    """
    return {
        "link": paper.link,
        "name": paper.name,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper.venue,
        "architecture": sidecar.architecture,
        "eps": _radius(sidecar.norm, sidecar.eval_eps),
        "clean_acc": _percent(accuracies.clean),
        "reported": _percent(accuracies.autoattack),
        "autoattack_acc": _percent(accuracies.autoattack),
        "footnote": _footnote(paper.footnote, accuracies),
        "unreliable": False,
    }


def _footnote(given: str | None, accuracies: Accuracies) -> str | None:
    """`given`, the number of images behind the accuracies, and the AutoAttack if not its authors'."""
    texts = [given] if given else []
    if accuracies.images is not None:
        texts.append(f"Accuracies on {accuracies.images} test images.")
    if accuracies.attack == "fast-autoattack":
        texts.append("AutoAttack by fastdynat's implementation.")
    return " ".join(texts) or None


def _percent(accuracy: float | None) -> str | None:
    return None if accuracy is None else f"{100 * accuracy:.2f}"


def _radius(norm: str, eps: float) -> str:
    """Under linf `8/255` where eps is such a fraction, else the number, as in the published entries."""
    levels = round(255 * eps)
    whole = norm == "linf" and levels > 0 and abs(255 * eps - levels) < 1e-6
    return f"{levels}/255" if whole else f"{eps:g}"
