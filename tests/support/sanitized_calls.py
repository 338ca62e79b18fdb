"""Calls of every operator, for a process under AddressSanitizer: run by test_sanitizers.py as a script.

    python sanitized_calls.py CPU_LIBRARY SIMULATED_CUDA_LIBRARY    the operators, in sanitized builds of
    csrc/ python sanitized_calls.py --read-past-the-end LIBRARY           an error that has to be found python
    sanitized_calls.py --on cuda cuda 10                     the operators of the built fastdynat._C on a GPU,
    for 10
                                                                    seconds and under compute-sanitizer
                                                                    (bench/gpu_check.sh)

An operator's entry in CALLS makes one call of the public function on given tensors; `batches` varies them.
Besides, each registered operator is called with arguments drawn from its schema alone: they may be refused,
but not crash.
"""

import contextlib
import ctypes
import importlib.machinery
import itertools
import random
import re
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: `support` lies there

DRAWN = 400  # calls of each operator from its schema
NAN = float("nan")
# Several blocks on the GPU, in whole vectors, odd, with fewer than a vector, with one element, without any:
# those that can show most come first, as a slow tool reaches the first ones only.
SHAPES = [(2, 3, 9, 33), (3, 3, 8, 8), (2, 3, 5, 7), (3, 1, 1, 3), (1, 1, 1, 1), (0, 3, 4, 4)]
IN_EVERY_LAYOUT = [(3, 3, 8, 8), (2, 3, 5, 7)]
DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (*DTYPES, torch.bfloat16, torch.float16)


def unaligned(t: Tensor) -> Tensor:
    """A copy one element past where the allocator aligns, at the very end of its memory."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "unaligned": unaligned,
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 1],
    "channels-last": lambda t: (
        t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.t().contiguous().t()
    ),
}


def batches() -> Iterator[tuple[Callable[..., Tensor], tuple[int, ...]]]:
    """Every (make, shape): make(size, dtype, special=True) is a tensor of one layout, some NaN or inf."""
    layouts = list(LAYOUTS.values())
    for i, (shape, layout) in enumerate(itertools.product(SHAPES, layouts)):
        if shape not in IN_EVERY_LAYOUT and i % len(layouts) != i // len(layouts) % len(layouts):
            continue  # another one of the layouts for each of the other shapes

        def make(
            *size: int,
            dtype: torch.dtype = torch.float32,
            special: bool = True,
            layout: Callable[..., Tensor] = layout,
        ) -> Tensor:
            t = torch.randn(size)
            if special:
                odd = torch.rand(size)
                t = torch.where(
                    odd < 0.05, NAN, torch.where(odd > 0.95, torch.inf, torch.where(odd > 0.9, 0.0, t))
                )
            t = t.to(dtype)
            return layout(t) if t.dim() in (2, 4) else unaligned(t)

        yield make, shape


def sizes() -> dict[str, Tensor]:
    """Step size and radius on the device, each alone in its memory."""
    return {"step_size": torch.tensor(0.1).double(), "eps": torch.tensor(0.2).double()}


def call_pgd_step_linf(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    for dtype, grad_dtype, low_dtype in itertools.product(
        DTYPES, GRAD_DTYPES, (None, torch.bfloat16, torch.float16)
    ):
        x, grad, x0 = make(*shape, dtype=dtype), make(*shape, dtype=grad_dtype), make(*shape, dtype=dtype)
        ops.pgd_step_linf(x, grad, x0, step_size=0.1, eps=0.2, backend=backend)
        ops.attack_step_linf(x, grad, x0, step_size=0.1, eps=0.2, low_dtype=low_dtype, backend=backend)
        ops.attack_step_linf(x, grad, x0, **sizes(), low_dtype=low_dtype, backend=backend)


def call_pgd_step_l2(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    for dtype, grad_dtype, low_dtype in itertools.product(
        DTYPES, GRAD_DTYPES, (None, torch.bfloat16, torch.float16)
    ):
        x, grad, x0 = make(*shape, dtype=dtype), make(*shape, dtype=grad_dtype), make(*shape, dtype=dtype)
        ops.attack_step_l2(x, grad, x0, step_size=0.1, eps=0.2, low_dtype=low_dtype, backend=backend)
        ops.attack_step_l2(x, grad, x0, **sizes(), low_dtype=low_dtype, backend=backend)


def call_project_on_hyperplane(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    for dtype, w_dtype, norm in itertools.product(DTYPES, GRAD_DTYPES, ("linf", "l2")):
        x, w, at = (
            make(*shape, dtype=dtype, special=False),
            make(*shape, dtype=w_dtype, special=False),
            make(*shape, dtype=dtype),
        )
        value = make(shape[0], dtype=dtype, special=False)
        for where in (at, x):  # with NaN and inf, and without
            ops.project_on_hyperplane(x, w, value, where, norm=norm, backend=backend)


def call_random_start(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    numbers = unaligned(torch.randint(2**32, shape[:1]))
    state = torch.tensor([2**63 - 1, -1])
    for dtype, kind in itertools.product(DTYPES, ("uniform", "gaussian", "l2")):
        for images in (None, numbers):
            x = make(*shape, dtype=dtype)
            ops.random_start(x, state, kind=kind, scale=0.2, images=images, backend=backend)
        ops.random_start(x, state, kind=kind, scale=sizes()["eps"], backend=backend)


def call_augment(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    images = unaligned(torch.randint(256, (3, *shape[1:]), dtype=torch.uint8))
    indices, flips = unaligned(torch.randint(3, shape[:1])), unaligned(torch.rand(shape[:1]) < 0.5)
    for dtype, channels_last, pad in itertools.product(GRAD_DTYPES, (False, True), (0, 2, 40)):
        shifts = unaligned(torch.randint(2 * pad + 1, (2, *shape[:1])))
        for crop, mirror in itertools.product((shifts, None), (flips, None)):
            out = ops.augment(
                images,
                indices,
                crop,
                mirror,
                pad=pad,
                dtype=dtype,
                channels_last=channels_last,
                backend=backend,
            )
            assert not out.isnan().any()


def call_pgd_step_l0(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    for dtype, grad_dtype in itertools.product(DTYPES, GRAD_DTYPES):
        x, grad, x0 = make(*shape, dtype=dtype), make(*shape, dtype=grad_dtype), make(*shape, dtype=dtype)
        ops.pgd_step_l0(x, grad, x0, step_size=0.1, pixels=2, backend=backend)


def call_pgd_step_l1(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    # Not all pairs: the simulator takes its time over so many passes.
    for dtype, grad_dtype in (*((torch.float32, g) for g in GRAD_DTYPES), (torch.float64, torch.float16)):
        x, grad, x0 = make(*shape, dtype=dtype), make(*shape, dtype=grad_dtype), make(*shape, dtype=dtype)
        ops.pgd_step_l1(x, grad, x0, step_size=0.1, eps=0.2, backend=backend)
    ops.pgd_step_l1(x, grad, x0, **sizes(), backend=backend)


def call_attack_logit_grad(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    rows, classes = shape[0], max(3, shape[1] * shape[2] * shape[3])
    labels = unaligned(torch.randint(classes, (rows,)))
    for dtype, rescale in itertools.product(GRAD_DTYPES, (False, True)):
        logits = make(rows, classes, dtype=dtype)
        for loss in ("ce", "margin", "dlr"):
            ops.attack_logit_grad(logits, labels, loss=loss, rescale=rescale, backend=backend)
        ops.attack_logit_grad(
            logits,
            make(rows, classes, dtype=dtype, special=False),
            loss="ce",
            rescale=rescale,
            backend=backend,
        )
        log_q = -make(rows, classes, dtype=dtype, special=False).abs()
        ops.attack_logit_grad(logits, log_q, loss="kl", rescale=rescale, backend=backend)


def call_soft_margin(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    for classes, dtype in itertools.product((2, 10, 33, 129, 1025), GRAD_DTYPES):
        logits = make(shape[0], classes, dtype=dtype).requires_grad_()
        labels = unaligned(torch.randint(classes, shape[:1]))
        ops.soft_margin(logits, labels, backend=backend).sum().backward()


def call_dynamic_label_cross_entropy(
    make: Callable[..., Tensor], shape: tuple[int, ...], backend: str
) -> None:
    from fastdynat import ops

    rows, classes = shape[0], max(2, shape[1] * shape[2] * shape[3])
    classified = unaligned(torch.randint(classes, (rows,)))
    # Kernels look both dtypes up at run time, one after the other.
    for dtype, guide_dtype, reduction in zip(
        GRAD_DTYPES, reversed(GRAD_DTYPES), ("none", "mean", "sum", "mean"), strict=True
    ):
        logits = make(rows, classes, dtype=dtype).detach().requires_grad_()
        guides = (classified, make(rows, classes, dtype=guide_dtype), make(rows, classes, dtype=guide_dtype))
        for guide, soft in zip(guides, (False, False, True), strict=True):
            out = ops.dynamic_label_cross_entropy(
                logits,
                guide,
                labels=classified,
                soft=soft,
                label_smoothing=0.1,
                reduction=reduction,
                backend=backend,
            )
            out.loss.sum().backward()


def call_winograd_conv3x3(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    n, c, height, width = shape
    for channels, outputs in ((c, 5), (70, 64), (64, 130)):  # less than a block of channels, more, whole ones
        forward, backward = (
            unaligned(torch.randn(36, channels, outputs)),
            unaligned(torch.randn(36, outputs, channels)),
        )
        x = make(n, channels, height, width).detach().requires_grad_()
        for bias in (None, unaligned(torch.randn(outputs))):
            ops.winograd_conv3x3(x, forward, backward, bias, backend=backend).sum().backward()
            for residual in (None, make(n, outputs, height, width)):
                more: Any = {"residual": residual, "relu": True, "backend": backend}
                ops.winograd_conv3x3(x, forward, backward, bias, **more).sum().backward()


def call_winograd_weights(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    weight = make(shape[2] * shape[3], shape[0], 3, 3, special=False)
    out = tuple(
        unaligned(torch.full(size, NAN)) for size in ((36, *weight.shape[1::-1]), (36, *weight.shape[:2]))
    )
    assert not any(t.isnan().any() for t in ops.winograd_weights(weight, out=out, backend=backend))


def call_image_conv_grad(make: Callable[..., Tensor], shape: tuple[int, ...], backend: str) -> None:
    from fastdynat import ops

    n, c, height, width = shape
    for outputs, rows, columns, stride, padding in ((5, 3, 3, 1, 1), (33, 1, 2, 2, 0), (130, 4, 3, 3, 4)):
        if height + 2 * padding < rows or width + 2 * padding < columns:
            continue
        x, weight = make(n, c, height, width), unaligned(torch.randn(outputs, c, rows, columns))
        x = x.detach().float().requires_grad_()
        for relu in (False, True):
            geometry: Any = {"stride": (stride, 1), "padding": (padding, padding)}
            ops.image_conv(x, weight, **geometry, relu=relu, backend=backend).sum().backward()


CALLS: dict[str, Callable[[Callable[..., Tensor], tuple[int, ...], str], None]] = {
    "attack_logit_grad": call_attack_logit_grad,
    "augment": call_augment,
    "dynamic_label_cross_entropy": call_dynamic_label_cross_entropy,
    "image_conv_grad": call_image_conv_grad,
    "pgd_step_l0": call_pgd_step_l0,
    "pgd_step_l1": call_pgd_step_l1,
    "pgd_step_l2": call_pgd_step_l2,
    "pgd_step_linf": call_pgd_step_linf,
    "project_on_hyperplane": call_project_on_hyperplane,
    "random_start": call_random_start,
    "soft_margin": call_soft_margin,
    "winograd_conv3x3": call_winograd_conv3x3,
    "winograd_weights": call_winograd_weights,
}


def drawn_arguments(schema: torch.FunctionSchema, rng: random.Random) -> list[Any]:
    """Arguments of the schema's types: mostly tensors that pass the checks, and some that do not."""
    shapes = [
        (0,),
        (1,),
        (7,),
        (0, 5),
        (3, 1),
        (4, 10),
        (5, 33),
        (2, 3, 4, 4),
        (2, 3, 5, 7),
        (0, 3, 4, 4),
        (),
    ]
    dtypes = [*GRAD_DTYPES, torch.int64, torch.int32, torch.bool, torch.uint8]
    shape, dtype = rng.choice(shapes), rng.choice(DTYPES)
    oddity = rng.choice([0.0, 0.1, 0.4])

    def tensor() -> Tensor:
        size, kind = shape, dtype
        if rng.random() < oddity:
            size = rng.choice([*shapes, (*shape[:1], 10)])
        elif rng.random() < 0.2:
            size, kind = shape[:1], rng.choice([dtype, torch.int64])
        if rng.random() < oddity:
            kind = rng.choice(dtypes)
        t = torch.randn(size) if kind.is_floating_point else torch.randint(-3, 12, size)
        if kind == torch.int64 and rng.random() < 0.1:
            t = t * 2**40  # class indices and seeds far out of range
        t = t.to(kind)
        choice = rng.random()
        if choice < 0.2:
            return torch.stack([t, t], -1)[..., 0]
        return unaligned(t) if choice < 0.4 else t.mT if choice < 0.5 and t.dim() >= 2 else t

    scalars: dict[str, Callable[[], Any]] = {
        "Tensor": tensor,
        "float": lambda: rng.choice([0.0, 0.1, 1.0, -1.0, 8.0, NAN, float("inf")]),
        "int": lambda: rng.choice([0, 1, 2, 3, 4, 10, -1, 2**40, -(2**63), 2**63 - 1]),
        "SymInt": lambda: rng.choice([0, 1, 2, 3, 4, 10, -1, 2**40]),
        "bool": lambda: rng.random() < 0.5,
        "ScalarType": lambda: rng.choice(
            (torch.bfloat16, torch.float16) if rng.random() >= oddity else dtypes
        ),
        "str": lambda: rng.choice(["", "linf", "mean", "none"]),
    }

    def draw(kind: str) -> Any:
        if kind.startswith("Optional["):
            return None if rng.random() < 0.4 else draw(kind.removeprefix("Optional[").removesuffix("]"))
        if kind.startswith("List["):
            return [draw(kind.removeprefix("List[").removesuffix("]")) for _ in range(rng.randrange(5))]
        return scalars[kind]()

    def argument(name: str, kind: str) -> Any:
        if name.startswith("device_") and rng.random() >= oddity:  # a size, which is a scalar
            return rng.choice([None, torch.tensor(scalars["float"]()).double()])
        return draw(kind)

    return [argument(a.name, str(a.real_type)) for a in schema.arguments]


def call_with_drawn_arguments(name: str) -> Counter[str]:
    operator = getattr(torch.ops.fastdynat, name).default
    rng = random.Random(name)
    outcomes: Counter[str] = Counter()
    for _ in range(DRAWN):
        try:
            operator(*drawn_arguments(operator._schema, rng))
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            outcomes["refused"] += 1
        else:
            outcomes["ran"] += 1
    return outcomes


def signatures() -> int:
    """The number of the operators' arguments in csrc, which the sanitized library does not tell."""
    module = Path(__file__).parents[2] / "csrc" / "module.cpp"
    found = re.search(r"kSignatures = (\d+);", module.read_text())
    assert found is not None
    return int(found[1])


def main(cpu_library: str, cuda_library: str) -> None:
    # In the place of fastdynat._C, which is not sanitized.
    extension = types.ModuleType("fastdynat._C")
    extension.__spec__ = importlib.machinery.ModuleSpec("fastdynat._C", None)
    extension.__dict__.update(WITH_CUDA=False, SIGNATURES=signatures())
    sys.modules["fastdynat._C"] = extension
    torch.ops.load_library(cpu_library)
    from support import cuda_sim

    missing = set(cuda_sim.operators()) - set(CALLS)
    for backend, names in (("cpp", cuda_sim.operators()), ("cuda", cuda_sim.cuda_operators())):
        with cuda_sim.simulated_cuda(Path(cuda_library)) if backend == "cuda" else contextlib.nullcontext():
            for call in (CALLS[name] for name in names if name in CALLS):
                for make, shape in batches():
                    call(make, shape, backend)
            for name in names:
                outcomes = call_with_drawn_arguments(name)
                print(f"{backend} {name}: of {DRAWN} drawn calls {outcomes['ran']} ran", flush=True)
    print(
        "clean"
        if not missing
        else f"no entry in CALLS of {Path(__file__).name} for: {', '.join(sorted(missing))}"
    )


def on_device(device: str, backend: str, seconds: float) -> None:
    """The calls in CALLS on tensors of `device`, shape by shape, until `seconds` have passed."""
    import fastdynat._C
    from support import cuda_sim

    assert backend != "cuda" or fastdynat._C.WITH_CUDA, "fastdynat._C has no CUDA half"
    names = cuda_sim.cuda_operators() if backend == "cuda" else cuda_sim.operators()
    shapes, begin = list(batches()), time.monotonic()
    with torch.device(device):
        for number, (make, shape) in enumerate(shapes):
            if time.monotonic() - begin > seconds:
                break
            for name in names:
                CALLS[name](make, shape, backend)
            if device == "cuda":
                torch.cuda.synchronize()  # an error shows here, not in a later call
            print(f"{number + 1} of {len(shapes)}: {len(names)} operators on {shape}", flush=True)
    print("clean")


def read_past_the_end(library: str) -> None:
    values = torch.arange(64, dtype=torch.int32)
    read = ctypes.CDLL(library).read
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    print("within:", read(values.data_ptr(), 63), flush=True)
    print("past the end:", read(values.data_ptr(), 64))


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "--read-past-the-end":
        read_past_the_end(sys.argv[2])
    elif sys.argv[1] == "--on":
        on_device(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main(*sys.argv[1:])
