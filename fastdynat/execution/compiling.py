"""torch.compile with one graph per function and input signature, and a fallback that is reported."""

import itertools
import logging
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported, UserError

from fastdynat.distributed import apart
from fastdynat.execution.compile_check import CompileCheck
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.execution.uncompiled import is_uncompiled
from fastdynat.machine.racing import race

# torch.compile's own modes capture CUDA graphs whose outputs the next call overwrites, while an attack chains
# its calls; `fastdynat.execution` captures graphs itself. Convolutions stay with cuDNN: Inductor's own
# templates gave wrong results (pytorch#173068).
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"max_autotune": True, "triton.cudagraphs": False, "max_autotune_conv_backends": "ATEN"},
}
AUTO = "auto"  # "default" where that is faster
REASON_LENGTH = 200  # characters; Dynamo's explanations fill pages
# Graphs of one function; each takes seconds to make and megabytes to keep. Dynamo's own limit is the same by
# default.
MAX_SIGNATURES = 8
_numbers = itertools.count()


def compile_whole(
    fn: Callable[..., Any],
    *,
    mode: str,
    what: str,
    fallbacks: Fallbacks,
    otherwise: Callable[..., Any] | None = None,
    check: CompileCheck | None = None,
) -> Callable[..., Any]:
    """`fn` compiled as one graph, for each input signature anew; shapes are never made symbolic.

    If that fails, the reason is added to `fallbacks`, once, and from then on `otherwise` runs; None is `fn`
    in several graphs, or uncompiled if the compiler itself fails. Signatures beyond the first
    `MAX_SIGNATURES` run uncompiled, which is added to `fallbacks` once.

    Args:
        fn: a Python function or a network; must not have run with another torch.compile wrapper of this
            function's making.
        mode: a key of `MODES`, or "auto": on the CPU, the first call times compiled and uncompiled against
            each other and the slower one is given up. `fn` must have no side effects then.
        what: names `fn` in the message.
        check: compares compiled code with what `otherwise` computes before its results are used; where they
            differ by more than rounding, `otherwise` runs. None is one of `fn` itself, with
            the parameters of a network.
    """
    return _Compiled(
        fn, mode, what, fallbacks, otherwise, check or CompileCheck(fn if isinstance(fn, nn.Module) else None)
    )


@contextmanager
def retained_graphs() -> Iterator[None]:
    """Context in which compiled functions can be differentiated with ``retain_graph=True``.

    Otherwise their backward pass overwrites what it has read ("donated buffers"), and refuses.
    """
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


class _Compiled:
    """The callable that `compile_whole` returns."""

    def __init__(
        self,
        fn: Callable[..., Any],
        mode: str,
        what: str,
        fallbacks: Fallbacks,
        otherwise: Callable[..., Any] | None,
        check: CompileCheck,
    ) -> None:
        quiet_about_cuda()
        self._options = dict(MODES["default" if mode == AUTO else mode])
        if torch.are_deterministic_algorithms_enabled():
            self._options["deterministic"] = (
                True  # Inductor then takes no kernel for its timing that sums in another order
            )
        self._own, self._plain = _own_code(fn), otherwise or fn
        self._run = torch.compile(self._own, fullgraph=True, dynamic=False, options=self._options)
        self._whole, self._in_parts = True, otherwise is None
        self._compiles, self._to_be_timed = True, mode == AUTO
        self._what, self._fallbacks, self._check = what, fallbacks, check
        self._known: set[Any] = set()
        self._full = self._told = False

    def __call__(self, *args: Any) -> Any:
        if not self._compiles or is_uncompiled():
            return self._plain(*args)
        signature = _signature(args)
        if signature not in self._known and (self._full or len(self._known) >= MAX_SIGNATURES):
            return self._beyond(args)
        try:
            with nullcontext() if signature in self._known else _no_advice_on_tf32():
                if self._check.due(signature) and not self._agrees(signature, args):
                    return self._plain(*args)
                result = self._run(*args)
        except FailOnRecompileLimitHit:  # torch._dynamo.config has a lower limit
            self._full = True
            return self._beyond(args)
        except TorchDynamoException as error:
            self._give_up(error)
            return self(*args)
        self._known.add(signature)
        if self._whole and self._to_be_timed:
            self._time(args)
        return result

    def _agrees(self, signature: Any, args: tuple[Any, ...]) -> bool:
        try:
            with apart():  # other ranks may know this signature
                difference = self._check(signature, self._run, self._plain, args)
        except torch.OutOfMemoryError:  # no fallback: the uncompiled function may need even more
            why = "there is not enough memory to compare it with the uncompiled one"
            self._fallbacks.add(f"{self._what} is compiled, but {why}")
            return True
        if difference is not None:
            self._fallbacks.add(f"{self._what} runs without torch.compile: when compiled, its {difference}")
            self._stop()
        return difference is None

    def _beyond(self, args: tuple[Any, ...]) -> Any:
        if not self._told:
            self._told = True
            shapes = f"{len(self._known)} shapes of input"
            self._fallbacks.add(f"{self._what} is compiled for {shapes}; others run without torch.compile")
        return self._plain(*args)

    def _give_up(self, error: Exception) -> None:
        how = "without torch.compile"
        # From torch 2.14 on, a branch on a tensor's value is Dynamo's UserError.
        if self._whole and self._in_parts and isinstance(error, Unsupported | UserError):
            self._run, self._whole = torch.compile(self._own, dynamic=False, options=self._options), False
            how = "in several compiled parts"
        else:
            self._stop()
        self._fallbacks.add(f"{self._what} runs {how}: {_reason(error)}")

    def _time(self, args: tuple[Any, ...]) -> None:
        """Keep the faster one. On a GPU that is the compiled one, which launches fewer kernels: it is not
        timed."""
        self._to_be_timed = False
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(tensor.is_cuda for tensor in tensors):
            return
        with apart():
            taken = race({"off": lambda: self._plain(*args), "on": lambda: self._run(*args)})
        if taken["on"] > taken["off"]:
            ratio = taken["on"] / taken["off"]
            shape = tuple(tensors[0].shape) if tensors else ()
            self._fallbacks.add(
                f"{self._what} runs without torch.compile: compiled it takes {ratio:.2f}x as long on {shape}"
            )
            self._stop()

    def _stop(self) -> None:
        """Run uncompiled from now on, and let the compiled code go."""
        self._compiles, self._run, self._own = False, self._plain, self._plain


@contextmanager
def _no_advice_on_tf32() -> Iterator[None]:
    """torch up to 2.13 warns, at the first compilation on an Ampere GPU or later, that matrix products do not
    use TF32.

    Their precision is the caller's choice; under ``-W error`` the advice would end the compilation.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        yield


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of Dynamo's compilations: equal for two calls that run the same code."""
    found = (
        (arg.shape, arg.stride(), arg.dtype, arg.device, arg.requires_grad)
        if isinstance(arg, Tensor)
        else arg
        for arg in args
    )
    return torch.is_grad_enabled(), *found


def _own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a function with a code object of its own.

    Dynamo keeps compiled code, and counts recompilations up to a limit, per code object; and all networks of
    one class, or all closures of one function, share one.
    """
    if not isinstance(fn, types.FunctionType):
        network = fn

        def fn(*args: Any) -> Any:
            return network(*args)

    code = fn.__code__.replace(co_name=f"{fn.__code__.co_name}_{next(_numbers)}")
    return types.FunctionType(code, fn.__globals__, code.co_name, fn.__defaults__, fn.__closure__)


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words[:REASON_LENGTH] or type(error).__name__


def quiet_about_cuda() -> None:
    """Keep torch from telling a machine without a GPU, at the first compilation, that it has none but a
    CUDA_HOME.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")
