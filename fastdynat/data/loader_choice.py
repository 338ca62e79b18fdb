"""Choice of the training loader, by name or by rule."""

import importlib
from typing import Any

import torch

from fastdynat.data.batches import TrainLoader
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.image_sets import Images, ImageSet
from fastdynat.data.imagefolder import FileSet
from fastdynat.data.resident_loader import ResidentLoader
from fastdynat.data.sources import RESIDENT_SHARE, TrainSplit
from fastdynat.data.torch_loader import TorchLoader
from fastdynat.errors import UserError
from fastdynat.launch import local_size
from fastdynat.machine.cores import own_cores
from fastdynat.machine.free_memory import own_memory

MAX_WORKERS = 8


def dali_problem() -> str | None:
    """The reason why the DALI loader cannot be used here, with the remedy; None if it can."""
    try:
        importlib.import_module("fastdynat.data.dali_loader")
    except (ImportError, OSError) as error:
        return f"DALI is not installed ({' '.join(str(error).split())[:200]}): pip install 'fastdynat[dali]'"
    return None


def check_dali() -> None:
    """Raise UserError where the DALI loader cannot be used."""
    problem = dali_problem()
    if problem:
        raise UserError(f"--loader dali: {problem}, or leave --loader out")


def default_workers() -> int:
    """Worker processes, or threads of DALI: one per core (`own_cores`) but one, from 1 to 8."""
    return max(1, min(MAX_WORKERS, own_cores() - 1))


def choose_loader(split: TrainSplit, device: torch.device, *, cuts_files: bool = False) -> tuple[str, str]:
    """Return the name of the loader that `auto` chooses, and the reason.

    resident where the images take at most a quarter of the memory they would stay in: the GPU's, and for
    files also the host's, of which each process on this machine has an equal part (other data are in host
    memory already, but for extra images). Else dali where it is installed and reads the files, else torch,
    which also reads extra images from their store.

    cuts_files: random parts of the images in their files are taken, which resident cannot, nor dali on a GPU.
    """
    if cuts_files:
        problem = dali_problem() or dali_file_problem(split.train_files())
        on_gpu = device.type == "cuda"
        return "torch" if problem or on_gpu else "dali", "random parts of the images in files are taken"
    memories: dict[str, int | None] = {}
    if device.type == "cuda":
        memories["GPU memory"] = torch.cuda.get_device_properties(device).total_memory
    if split.in_files or split.extra is not None:
        ranks = local_size()
        whose = "" if ranks == 1 else f" to each of {ranks} processes"
        memories[f"memory available{whose}"] = own_memory()
    size = f"{split.num_bytes / 2**30:.2f} GiB of images"
    for name, amount in memories.items():
        if amount is not None and split.num_bytes > RESIDENT_SHARE * amount:
            why = f"{size} are more than {RESIDENT_SHARE:.0%} of the {amount / 2**30:.1f} GiB of {name}"
            if split.extra is not None:
                return "torch", why
            problem = dali_problem() or (dali_file_problem(split.train_files()) if split.in_files else "")
            return ("torch", f"{why}; {problem}") if problem else ("dali", why)
    return "resident", f"{size} fit in memory"


def dali_file_problem(files: Images) -> str:
    """The reason why DALI would not read `files`, which are not in memory, as Pillow does; "" if it does."""
    return files.dali_problem if isinstance(files, FileSet) else "DALI reads files of an image folder only"


def make_loader(name: str, images: Images | ExtendedImages, *, workers: int, **options: Any) -> TrainLoader:
    """Build the loader "resident" (of images in memory), "dali" or "torch". Options: `PlannedLoader`.

    Raises: UserError where DALI was chosen by name and cannot be used, or cannot read `images`.
    """
    if name == "torch":
        return TorchLoader(images, workers=workers, **options)
    if name == "dali":
        check_dali()
        from fastdynat.data.dali_loader import DaliLoader  # needs the extra

        if not isinstance(images, ImageSet | FileSet | ExtendedImages):
            raise UserError(
                f"--loader dali: {dali_file_problem(images)}; use --loader torch, or leave it out"
            )
        return DaliLoader(images, workers=workers, **options)
    assert isinstance(images, ImageSet | ExtendedImages)
    return ResidentLoader(images, **options)
