"""torch.compile with one graph per function and input signature, and a fallback that is said."""

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException, Unsupported

# torch.compile's own modes capture CUDA graphs whose outputs the next call overwrites, while an attack chains its calls; graphs
# are `fastdynat.graphs`' business. Convolutions stay cuDNN's: Inductor's own templates gave wrong results (pytorch#173068).
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"max_autotune": True, "triton.cudagraphs": False, "max_autotune_conv_backends": "ATEN"},
}
REASON_LENGTH = 200  # Dynamo's explanations fill pages
_numbers = itertools.count()


def compile_whole(
    fn: Callable[..., Any],
    *,
    mode: str,
    what: str,
    say: Callable[[str], None],
    otherwise: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`fn` compiled as one graph, for each input signature anew; shapes are never made symbolic.

    Where that is impossible, `say` is told why, once, and from then on `otherwise` runs; None is `fn` in several graphs, or as
    it is where the compiler itself fails.

    Args:
        fn: a Python function or a network; must not have run with another torch.compile wrapper of this function's making.
        mode: a key of `MODES`.
        what: names `fn` in the message.
    """
    own = _own_code(fn)
    whole = torch.compile(own, fullgraph=True, dynamic=False, options=MODES[mode])
    chosen: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal chosen
        if chosen is None:
            try:
                return whole(*args)
            except TorchDynamoException as error:
                chosen, how = otherwise or fn, "without torch.compile"
                if otherwise is None and isinstance(error, Unsupported):
                    chosen, how = torch.compile(own, dynamic=False, options=MODES[mode]), "in several compiled parts"
                say(f"{what} runs {how}: {_reason(error)}")
        return chosen(*args)

    return call


def _own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a function with a code object of its own.

    Dynamo keeps compiled code, and counts recompilations up to a limit, per code object; and all networks of one class, or all
    closures of one function, share one.
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
