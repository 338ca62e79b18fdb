"""Weights as safetensors with a JSON sidecar: read without running code, checked before use."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from fastdynat.data import DatasetInfo
from fastdynat.documents.tensor_files import check_safetensors, read_safetensors
from fastdynat.errors import UserError
from fastdynat.execution.process_state import process_state_kept
from fastdynat.models import build_model
from fastdynat.models.finite import check_finite
from fastdynat.runs.atomic_files import replacing
from fastdynat.runs.find import find_checkpoint
from fastdynat.runs.layout import BEST, STATE, real
from fastdynat.runs.manifest import check_manifest, sha256
from fastdynat.runs.sidecar import Sidecar, read_sidecar, write_sidecar
from fastdynat.user_code import OBJECT, is_object, short_name


def save_weights(path: Path | str, state: dict[str, Tensor], sidecar: Sidecar) -> None:
    """Write the state dict `state`, on any device, to `path` (.safetensors), and its sidecar (.json)."""
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    # safetensors makes files that only their owner can read; `replacing` gives this one the usual mode.
    with replacing(path, needed=sum(tensor.nbytes for tensor in tensors.values())) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    write_sidecar(path, sidecar, sha256(path))


def load_state(path: Path | str) -> tuple[dict[str, Tensor], Sidecar]:
    """The tensors at `path`, on the CPU, and their sidecar, after a check of the sha256.

    Raises:
        UserError: missing, truncated, not safetensors, or not the file that the sidecar was written for.
    """
    path = Path(path)
    sidecar, promised = read_sidecar(path)
    if not path.exists():
        raise UserError(f"no weights at {path}")
    check_safetensors(path)
    found = sha256(path)
    if found != promised:
        raise UserError(
            f"{path} is damaged or was changed: sha256 {found[:12]}..., its .json says {promised[:12]}..."
        )
    return read_safetensors(path), sidecar


def build_from_sidecar(sidecar: Sidecar) -> nn.Module:
    """The untrained network that `sidecar` describes."""
    return build_model(
        sidecar.architecture,
        num_classes=sidecar.num_classes,
        image_shape=sidecar.image_shape,
        mean=sidecar.mean,
        std=sidecar.std,
    )


def load_into(network: nn.Module, state: dict[str, Tensor], origin: Path, architecture: str) -> None:
    """Load `state` into `network` strictly.

    Raises:
        UserError: names or shapes differ, so the file belongs to another architecture.
    """
    try:
        network.load_state_dict(state, strict=True)
    except Exception as error:  # tensors of other types fail in their own ways
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{origin} is not a {architecture}: {first}") from None


def data_difference(sidecar: Sidecar, info: DatasetInfo) -> str:
    """The data that a network was trained on, in words, if they are not like `info`; else ""."""
    theirs, ours = (len(sidecar.class_names), sidecar.image_shape), (len(info.class_names), info.image_shape)
    if theirs != ours:
        return (
            f"{sidecar.dataset} ({theirs[0]} classes, images {theirs[1]}), "
            f"but {info.name} has {ours[0]} classes and images {ours[1]}"
        )
    for number, (a, b) in enumerate(zip(sidecar.class_names, info.class_names, strict=True)):
        if a != b:
            return f"{sidecar.dataset}, whose class {number} is {a!r}, but in {info.name} it is {b!r}"
    return ""


def check_test_images(sidecar: Sidecar, info: DatasetInfo, run: str) -> None:
    """Refuse what the own code of `run` makes now, if those are not the run's test images.

    Raises:
        UserError: they differ in any pixel or label, so the network may have been trained on them.
    """
    then, now = sidecar.test_origin, info.test_origin
    if then is None or now is None or then[0] != now[0] or then == now:
        return
    raise UserError(
        f"{info.name} makes other test images than when {run} was trained, or decodes differently on this "
        "machine, so they may be among its training images: use a fixed seed in the code, such as "
        "random_state=0, and train again; to evaluate on these images on purpose, name another function by "
        "--data, or give arrays to fastdynat.evaluate"
    )


def guide_weights(path: Path | str) -> Path:
    """The .safetensors file that `path` is, or that the best checkpoint of the run directory `path` has.

    Raises:
        UserError: `path` is neither.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    folder = find_checkpoint(path, BEST)
    if folder is None or not (folder / "model.safetensors").exists():
        raise UserError(f"{path} is neither a .safetensors file nor a run directory with a best checkpoint")
    return real(folder / "model.safetensors")


@process_state_kept()
def load_network(path: Path | str, *, into: nn.Module | None = None) -> tuple[nn.Module, Sidecar]:
    """The trained network at `path`, in eval mode, and its sidecar.

    Args:
        path: a .safetensors file, or a run directory, which stands for the model of its best checkpoint.
        into: a network of the same architecture to load the weights into, on its own device; needed for a
            network that was trained as a Python object. None builds the network on the CPU.

    Raises:
        UserError: see `load_state` and `load_into`; also for weights that are NaN or infinite.
    """
    path = guide_weights(path)
    state, sidecar = load_state(path)
    network_name = short_name(sidecar.architecture).removeprefix(OBJECT)
    if into is None and is_object(sidecar.architecture):
        raise UserError(
            f"{path} holds weights only: the network ({network_name}) was given to fastdynat.train as a "
            f"Python object; pass such a module, fastdynat.load_network({str(path)!r}, into=my_module), or "
            f"name a function that makes it, fastdynat eval my.py:make_net --weights {path}"
        )
    network = build_from_sidecar(sidecar) if into is None else into
    before = {key: value.clone() for key, value in into.state_dict().items()} if into is not None else None
    try:
        load_into(network, state, path, network_name)
    except UserError:
        if before is not None:  # what fits has been put in before the rest failed
            network.load_state_dict(before)
        raise
    check_finite(network, path)
    return network.eval(), sidecar


def load_checkpoint(run: Path | str, checkpoint: str) -> tuple[nn.Module, Sidecar, str]:
    """The network of a checkpoint (last or best) of `run`, its sidecar, and the sha256 of its weights.

    Raises:
        UserError: there is none, or its files are damaged; see `check_manifest` and `load_network`.
    """
    run = Path(run)
    folder = find_checkpoint(run, checkpoint)
    while folder is not None:
        try:
            check_manifest(folder, optional=(STATE,))
            weights = folder / "model.safetensors"
            network, sidecar = load_network(weights)
            return network, sidecar, read_sidecar(weights)[1]
        except UserError:
            # The run may be training, and have replaced this checkpoint.
            if (newer := find_checkpoint(run, checkpoint)) == folder:
                raise
            folder = newer
    raise UserError(f"{run} has no {checkpoint} checkpoint")
