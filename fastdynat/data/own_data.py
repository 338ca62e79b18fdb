"""Data of the user: tensors, a torch Dataset or parts of these, as the image sets that training reads.

They come from a callable in a file (`--data my.py:make_data`) or as objects (`fastdynat.train(data=...)`).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdynat.data.image_sets import CONVERT_CHUNK, DatasetInfo, ImageSet, channel_stats
from fastdynat.data.own_arrays import (
    class_labels,
    dense_tensor,
    dtype_and_shape,
    uint8_pixels,
    warn_of_rounding,
)
from fastdynat.data.read_ahead import set_digest
from fastdynat.errors import UserError, shown
from fastdynat.machine.free_memory import check_room
from fastdynat.user_code import (
    OBJECT,
    call_object,
    error_with_place,
    import_object,
    is_object,
    short_name,
    unpinned,
)

FORMS = (
    "give (images, labels), a torch Dataset of (image, label), (train, test), or a dict with train and "
    "optionally test, val and classes"
)
KEYS = ("train", "val", "test", "classes")
NOT_DATA = (tuple, list, str, torch.nn.Module)  # although they have a length and items
READ_TWICE = 16  # images of a Dataset that must be the same when read again
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class OwnData:
    """The parts of the user's data, checked; `val` and `test` may be missing."""

    info: DatasetInfo
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None


_given: ContextVar[dict[str, OwnData] | None] = ContextVar("given data", default=None)
_called: dict[str, OwnData] = {}  # the last callable's data, by its pinned name


@contextmanager
def given_data(data: OwnData) -> Iterator[str]:
    """Let `open_train` and `load_test` know `data` within the block, by the name that is yielded."""
    name = f"{OBJECT}{data.info.name}"
    token = _given.set({name: data})
    try:
        yield name
    finally:
        _given.reset(token)


def own_data(name: str) -> OwnData:
    """The data that the user's code called `name` makes, or that was given by that name.

    Raises:
        UserError: there is no such code, it fails, or what it makes is not data (`own_parts`).
    """
    if is_object(name):
        given = (_given.get() or {}).get(name)
        if given is None:
            raise UserError(
                f"{name} is data that was given to fastdynat.train as a Python object and cannot be "
                "read by name: use --data my.py:make_data; or in Python "
                "fastdynat.evaluate(model, data), or fastdynat.train(model, data, resume=RUN)"
            )
        return given
    if name in _called:  # pinned: the content of the file is part of the name
        return _called[name]
    made, source = import_object(name)
    if callable(made) and not hasattr(made, "__getitem__"):
        made = call_object(made, name, {}, "data")
    found = own_parts(made, short_name(name))
    if found.test is not None:  # the code may make others when an evaluation calls it
        function = unpinned(name).rpartition(":")[2]
        code = hashlib.sha256(function.encode() + b"\0" + source).hexdigest()
        origin = (code, set_digest(found.test))
        found = replace(found, info=replace(found.info, test_origin=origin))
    _called.clear()
    if name != unpinned(name):
        _called[name] = found
    return found


def own_parts(data: object, name: str) -> OwnData:
    """`data` as image sets.

    Args:
        data: a pair (images, labels); a torch Dataset of (image, label); a pair (train, test) of these; or a
            dict with "train" and optionally "test", "val" and "classes" (a number or the names). Images:
            uint8 (N, C, H, W), or floats in [0, 1], which are kept with 8 bits per channel. Labels: whole
            numbers (N,) from 0.
        name: of the data, for messages.

    Raises:
        UserError: any other form, range, shape or type, in one line.
    """
    raw = _split_parts(data, name)
    declared = raw.pop("classes", None)
    raw = {part: value for part, value in raw.items() if value is not None}
    called = {part: f"{name} ({part})" if len(raw) > 1 else name for part in raw}
    converted = {part: _image_set(value, called[part]) for part, value in raw.items()}
    parts = {part: images for part, (images, _) in converted.items()}
    warn_of_rounding(max(moved for _, moved in converted.values()), name)
    shapes = {part: tuple(images.images.shape[1:]) for part, images in parts.items()}
    for part, shape in shapes.items():
        if shape != shapes["train"]:
            raise UserError(
                f"{name}: {part} images are {shape}, training images {shapes['train']}; give all one size"
            )
    names = _class_names(declared, parts, name)
    train = parts["train"]
    mean, std = channel_stats(train.images.split(CONVERT_CHUNK))
    info = DatasetInfo(
        name=name,
        num_classes=len(names),
        image_shape=(int(shapes["train"][0]), int(shapes["train"][1]), int(shapes["train"][2])),
        class_names=names,
        mean=mean,
        std=std,
        augment="none",  # what suits the images, only their owner knows
    )
    return OwnData(info, train, parts.get("val"), parts.get("test"))


def check_logit_count(data: OwnData, logits: int) -> None:
    """Raise UserError unless a network with so many `logits` fits the classes of `data`."""
    classes, name = data.info.num_classes, data.info.name
    if logits == classes:
        return
    more = f', or say {{"train": ..., "classes": {logits}}}' if logits > classes else ""
    raise UserError(
        f"{name} has {classes} classes, labels 0 to {classes - 1}, but the network has {logits} logits: give "
        f"its last layer {classes} outputs{more}"
    )


def _split_parts(data: object, name: str) -> dict[str, Any]:
    """The parts of `data` by name, each a pair or a Dataset."""
    if isinstance(data, Mapping):
        unknown = [key for key in data if key not in KEYS]
        if unknown or data.get("train") is None:
            problem = f"unknown key {shown(str(unknown[0]))}" if unknown else "no 'train'"
            raise UserError(
                f"{name}: {problem} in the dict; it has train and optionally test, val and classes"
            )
        return dict(data)
    if _is_pair(data) or not isinstance(data, tuple | list):
        return {"train": data}
    if len(data) == 2 and _is_array(data[0]) and isinstance(data[1], tuple | list):
        raise UserError(f"{name}: the labels are a {type(data[1]).__name__}; use torch.tensor(labels)")
    if len(data) == 2:
        return {"train": data[0], "test": data[1]}
    raise UserError(f"{name}: a {type(data).__name__} of {len(data)} parts is ambiguous; {FORMS}")


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_pair(data: object) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(_is_array(part) for part in data)


def _image_set(part: Any, name: str) -> tuple[ImageSet, float]:
    """`part` as images and labels, and the largest change of a value in [0, 1] by rounding to 8 bits."""
    if _is_pair(part):
        images, labels = (dense_tensor(side, name) for side in part)
    elif hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, NOT_DATA):
        images, labels = _read_dataset(part, name)
    elif hasattr(part, "dataset") and hasattr(part, "batch_size"):
        raise UserError(
            f"{name} is a DataLoader; give its dataset, which is loaded, shuffled and batched here"
        )
    elif hasattr(part, "__iter__") and not isinstance(part, NOT_DATA):
        raise UserError(
            f"{name} is a {type(part).__name__} without a length; give a Dataset with __len__ and __getitem__"
        )
    else:
        raise UserError(f"{name} is a {type(part).__name__}, not data; {FORMS}")
    numpy = [_is_pair(part) and isinstance(part[side], np.ndarray) for side in range(2)]
    pixels, moved = uint8_pixels(images, name, numpy=numpy[0])
    return ImageSet(pixels, class_labels(labels, len(images), name, numpy=numpy[1])), moved


def _read_dataset(data: Any, name: str) -> tuple[Tensor, Tensor]:
    """All images and labels of a Dataset, in its order."""
    count = len(data)
    if count == 0:
        raise UserError(f"{name} has no images")
    for index in range(min(count, READ_TWICE)):  # a random flip leaves every other image as it is
        if not _same(_image(data, index, name), _image(data, index, name)):
            raise UserError(
                f"{name}: image {index} changes each time it is read: leave random transforms out and use "
                "augment= instead"
            )
    first = _image(data, 0, name)[0]
    check_room(count * first.nbytes, f"{name}: its {count} images are read into memory, which takes")
    images, labels = (
        torch.empty((count, *first.shape), dtype=first.dtype),
        torch.empty(count, dtype=torch.int64),
    )
    for index in range(count):
        image, label = _image(data, index, name)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise UserError(
                f"{name}: image {index} is {dtype_and_shape(image)}, image 0 {dtype_and_shape(first)}; "
                "give all one size and type"
            )
        images[index], labels[index] = image, label
    return images, labels


def _same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def _image(data: Any, index: int, name: str) -> tuple[Tensor, int]:
    """Image (C, H, W) and label of an item; a PIL image becomes uint8."""
    try:
        item = data[index]
    except Exception as error:
        raise UserError(f"{name}: reading item {index} failed: {error_with_place(error)}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"{name}: item {index} is a {type(item).__name__}, not a pair (image, label)")
    image, label = item
    if hasattr(image, "getbands"):  # of PIL
        if image.mode not in ("L", "RGB"):
            raise UserError(f"{name}: image {index} has mode {image.mode}; convert it to RGB or L")
        pixels = torch.from_numpy(np.array(image))
        image = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if not _is_array(image):
        raise UserError(
            f"{name}: image {index} is a {type(image).__name__}, not a tensor (C, H, W) or a PIL image"
        )
    if isinstance(label, bool | float) or not hasattr(label, "__index__"):
        raise UserError(f"{name}: label {index} is {shown(repr(label))}, not the number of a class")
    pixels = dense_tensor(image, name)
    try:
        return pixels, label.__index__()
    except (TypeError, ValueError):
        raise UserError(f"{name}: label {index} is {shown(repr(label))}, not the number of a class") from None


def _class_names(declared: object, parts: Mapping[str, ImageSet], name: str) -> tuple[str, ...]:
    """The class names, "0", "1", ... by default; checks that every label is below their number."""
    largest = max(int(part.labels.max()) for part in parts.values())
    if largest >= MOST_CLASSES:
        raise UserError(
            f"{name}: label {largest} is beyond {MOST_CLASSES:,} classes; number the classes from 0"
        )
    names: tuple[str, ...]
    if declared is None:
        names = tuple(map(str, range(largest + 1)))
    elif isinstance(declared, int | np.integer) and not isinstance(declared, bool):
        names = tuple(map(str, range(int(declared))))
    elif isinstance(declared, Sequence | np.ndarray) and not isinstance(declared, str):
        names = tuple(map(str, declared))
    else:
        raise UserError(f"{name}: classes must be a number or the names, got {shown(repr(declared))}")
    for part, images in parts.items():
        bad = ((images.labels < 0) | (images.labels >= len(names))).nonzero().flatten()
        if len(bad):
            index = int(bad[0])
            raise UserError(
                f"{name} ({part}): label {int(images.labels[index])} at index {index} is outside [0, "
                f"{len(names)}); number the {len(names)} classes from 0"
            )
    return names
