"""Networks of the user: made by a callable in a file (`--model my.py:make_net`), or given as a module.

Such a network takes images in [0, 1] as they are; nothing is put in front of it.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fastdynat.caller_warnings import warn_caller
from fastdynat.errors import UserError, first_line
from fastdynat.models.finite import check_finite
from fastdynat.models.logits import own_dtype
from fastdynat.user_code import OBJECT, call_object, error_with_place, import_object, is_object, short_name

Shape = tuple[int, int, int]
PROBABILITIES = (
    "its outputs look like probabilities: the loss's gradients vanish and attacks look weaker than they are; "
    "return logits"
)
_given: ContextVar[dict[str, nn.Module] | None] = ContextVar("given networks", default=None)


@contextmanager
def given_network(module: nn.Module) -> Iterator[str]:
    """Let `build_model` know `module` within the block by the name that is yielded; it builds copies of it.

    Raises:
        UserError: the module cannot be copied.
    """
    name = f"{OBJECT}{type(module).__name__}"
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(f"the model, a {type(module).__name__}, has no parameter with requires_grad to train")
    try:
        copy.deepcopy(module)
    except Exception as error:
        raise UserError(
            f"the model, a {type(module).__name__}, cannot be copied ({first_line(error)}): training works "
            "on a copy; keep only modules, parameters and plain values in it"
        ) from None
    token = _given.set({name: module})
    try:
        yield name
    finally:
        _given.reset(token)


def network_of(name: str, offered: dict[str, object]) -> tuple[nn.Module, bytes]:
    """The network that the user's code called `name` makes, and the bytes of the source file that it is in.

    Args:
        offered: passed to the callable where it has a parameter of that name. A network in place of a
            callable is taken as it is.

    Raises:
        UserError: there is no such module or callable, it raises, or makes no nn.Module.
    """
    made, source = import_object(name)
    if not isinstance(made, nn.Module):
        made = call_object(made, name, offered, "a network")
    if not isinstance(made, nn.Module):
        raise UserError(f"{name} makes a {type(made).__name__}, not a torch.nn.Module")
    return made, source


def own_network(
    name: str, *, num_classes: int, image_shape: Shape, mean: Sequence[float] | None
) -> nn.Module:
    """The user's network called `name`: built anew by a callable, or a copy of the module given in Python.

    Raises:
        UserError: there is none, it does not map such images to so many logits, its weights are not finite
            or not float32, or a normalisation (`mean`) is asked for.
    """
    if mean is not None:
        raise UserError(
            f"--normalize: {short_name(name)} takes images in [0, 1] as they are; normalise inside of it, "
            "and leave --normalize out"
        )
    given = None
    if is_object(name):
        given = (_given.get() or {}).get(name)
        if given is None:
            raise UserError(
                f"{name} is a network that was given to fastdynat.train as a Python object and "
                "cannot be rebuilt from its name: in Python, fastdynat.load_network(RUN, into=my_module) or "
                "fastdynat.train(my_module, my_data, resume=RUN); or train with --model my.py:make_net"
            )
        model = copy.deepcopy(given)
    else:
        model = network_of(name, {"num_classes": num_classes, "image_shape": image_shape})[0]
    check_finite(model, short_name(name))
    if own_dtype(model) not in (None, torch.float32):
        raise UserError(
            f"{short_name(name)} has weights in {own_dtype(model)}, but training moves float32 weights: pass "
            "model.float(), and amp='bf16' or 'fp16' for passes in half precision"
        )
    suspicion = check_network_output(model, short_name(name), num_classes, image_shape)
    if suspicion:
        warn_caller(f"{short_name(name)}: {suspicion}")
    if given is not None:
        _check_independent(model, given, image_shape)
    return model


def count_logits(model: nn.Module, name: str, image_shape: Shape) -> int:
    """The number of logits of `model` for images of this shape.

    Raises:
        UserError: see `check_network_output`.
    """
    check_network_output(model, name, None, image_shape)
    out = look(model, torch.zeros(2, *image_shape))
    assert isinstance(out, Tensor)
    return out.shape[1]


def check_network_output(model: nn.Module, name: str, num_classes: int | None, image_shape: Shape) -> str:
    """Run two random images through `model` in eval mode; returns "" or why its outputs may be no logits.

    Raises:
        UserError: it fails, or returns another shape.
    """
    x = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    size = "x".join(map(str, image_shape)) + " images"
    before = x.clone()
    try:
        out = look(model, x)
    except Exception as error:
        raise UserError(f"{name} does not take {size}: {error_with_place(error)}") from error
    if not torch.equal(x, before):
        raise UserError(f"{name} changes its input in place; write x = x - mean in place of x -= mean")
    got, wanted = output_shape(out), "(2, classes)" if num_classes is None else str((2, num_classes))
    if (
        not isinstance(out, Tensor)
        or out.dim() != 2
        or len(out) != 2
        or out.shape[1] != (num_classes or out.shape[1])
    ):
        raise UserError(
            f"{name} maps two {size} to {got}, not to logits {wanted}: it was made for other data, or "
            f"returns no logits"
        )
    if bool(out.isnan().any(1).all()):
        raise UserError(
            f"{name} answers two random {size} with NaN, so it predicts nothing: see that its forward does "
            "not overflow or divide by zero, and that its weights are loaded"
        )
    if bool((out >= 0).all()) and bool(((out.sum(1) - 1).abs() < 1e-3).all()):
        return PROBABILITIES
    return ""


def _check_independent(copied: nn.Module, given: nn.Module, image_shape: Shape) -> None:
    """Raise UserError if `copied` computes with parameters of `given`, which training would not move.

    A function or hook that was made with ``lambda: self.layer(...)`` is copied with the old ``self``.
    """
    parameters = {key: value for key, value in given.named_parameters() if value.requires_grad}
    state = next(iter(parameters.values()))
    with torch.enable_grad(), _eval_mode(copied):
        out = copied(torch.zeros(2, *image_shape, device=state.device))
        if not out.requires_grad:
            return
        gradients = torch.autograd.grad(out.sum(), list(parameters.values()), allow_unused=True)
    for key, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            raise UserError(
                f"a copy of the {type(given).__name__} still computes with {key} of the original, so "
                "training would not change it: keep no lambda, inner function or hook in the model that "
                "refers to its layers; use methods"
            )


@torch.no_grad()
def look(model: nn.Module, x: Tensor) -> object:
    """The output of `model` in eval mode for `x`, which is moved to its device and dtype.

    Its modes, its buffers and the random state stay.
    """
    state = next((tensor for part in (model.parameters(), model.buffers()) for tensor in part), x)
    with _eval_mode(model):
        return model(x.to(state.device, own_dtype(model)))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards each module has its own mode again, and the generators their state."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, training in modes:
            part.training = training


def output_shape(out: object) -> tuple[int, ...] | str:
    """The shape of a tensor; of anything else the name of its type."""
    return tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
