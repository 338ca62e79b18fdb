"""The CUDA kernels in the CPU simulator: it finds planted faults, and results equal the reference's.

What an operator computes is tested in its own file, which lists SIMULATED_CUDA among its backends; here is
what the simulator does, and what only kernels that work in 16-byte packs have to fear.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from conftest import needs
from support import cuda_sim
from torch import Tensor

from fastdynat import ops

pytestmark = needs("cxx")
SIZE = 640


@pytest.fixture(scope="module")
def samples(compiled: Path) -> ctypes.CDLL:
    sources = [
        (cuda_sim.HERE / "simulator.cpp", []),
        (cuda_sim.HERE / "samples.cu", [*cuda_sim.SIMULATE, cuda_sim.WATCH]),
    ]
    return ctypes.CDLL(str(cuda_sim.build(compiled, "samples", sources)))


def run_sample(samples: ctypes.CDLL, name: str, x: Tensor, out: Tensor) -> str:
    """The simulator's report; empty without findings."""
    message = ctypes.create_string_buffer(1000)
    pointers = [ctypes.cast(t.data_ptr(), ctypes.POINTER(ctypes.c_float)) for t in (x, out)]
    code = samples.run_sample(name.encode(), *pointers, message, ctypes.c_size_t(len(message)))
    assert code == (1 if message.value else 0)
    return message.value.decode()


def test_barriers_shuffles_and_votes(samples: ctypes.CDLL) -> None:
    x, out = torch.rand(64), torch.full((SIZE,), torch.nan)
    assert run_sample(samples, "correct", x, out) == ""
    i = torch.arange(64)
    lane, warp = i % 32, i // 32 * 32
    expected = [
        x.flip(0),
        warp + (lane ^ 5),
        torch.where(lane >= 3, i - 3, i),
        torch.where(i % 8 < 5, i + 3, i),
        warp + 9,
        torch.where(i < 32, 11, 11),  # 0, 3, ..., 30 and 33, 36, ..., 63
        torch.full((64,), 22),
        torch.full((64,), 3),
        torch.full((64,), 64 * 63 // 2),
        torch.where(i < 8, 28, torch.where(i < 32, 1, 0)),
    ]
    torch.testing.assert_close(out, torch.cat([part.float() for part in expected]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "part_of_the_block_at_a_barrier",
            r"block 0: thread 0 waits in __syncthreads at samples.cu:\d+ with 32 of 64 threads, but thread "
            r"32 has returned",
        ),
        ("return_before_a_barrier", r"with 63 of 64 threads, but thread 40 has returned"),
        (
            "two_barriers",
            r"thread 0 waits in __syncthreads at samples.cu:\d+, but thread 32 waits in .*: two barriers",
        ),
        ("missing_lane", r"thread 0 waits in __shfl_xor_sync\(0xffffffff\) at .*, but thread 5 has returned"),
        ("lane_outside_the_mask", r"reads from lane 9, which is not in the mask"),
        (
            "missing_barrier",
            r"thread \d+ reads shared memory at samples.cu:\d+ that this block has not written",
        ),
        (
            "missing_second_barrier",
            r"thread \d+ reads shared memory .* that thread \d+ writes, with no barrier between them",
        ),
        (
            "write_after_read",
            r"thread 0 writes shared memory .* that thread \d+ reads, with no barrier between them",
        ),
        (
            "unwritten_shared_memory",
            r"block 1: thread \d+ reads shared memory .* that this block has not written",
        ),
        ("misaligned", r"misaligned access to 0x\w+4 at samples.cu:\d+"),
        ("out_of_bounds", r"thread 63: index 63 is out of bounds at samples.cu:\d+"),
        (
            "blocks_overlap",
            r"block 1: thread 0 writes global .* thread 63 of block 0 writes with another value, unordered",
        ),
        (
            "not_atomic",
            r"thread \d+ reads global memory .* that thread \d+ writes, with no barrier between them",
        ),
        ("no_blocks", r"a launch of 0 blocks is an error in CUDA"),
        ("too_many_threads", r"a launch of 1025 threads is an error in CUDA"),
    ],
)
def test_broken_kernels_are_found(samples: ctypes.CDLL, name: str, message: str) -> None:
    x, out = torch.rand(64), torch.zeros(SIZE)
    x[40] = -1.0
    assert re.search(message, run_sample(samples, name, x, out))


@pytest.mark.parametrize(("name", "first"), [("blocks_write_one_value", 1.0), ("atomic", 192.0)])
def test_what_is_allowed_between_blocks(samples: ctypes.CDLL, name: str, first: float) -> None:
    out = torch.zeros(SIZE)
    assert run_sample(samples, name, torch.zeros(64), out) == ""
    assert out[0] == first


@pytest.mark.simulated
def test_every_operator_has_a_cuda_kernel() -> None:
    for name in cuda_sim.cuda_operators():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdynat_sim::{name}", "CPU"), name


def test_operators_of_the_cpu_alone_say_so() -> None:
    assert set(cuda_sim.operators()) >= cuda_sim.CPU_ONLY
    registered = "".join(path.read_text() for path in (cuda_sim.CSRC / "cuda").glob("*.cu"))
    for name in cuda_sim.CPU_ONLY:
        assert f'"{name}"' not in registered
        assert f"fastdynat::{name}_triton" not in torch._C._dispatch_get_all_op_names()
    weight = torch.rand(2, 2, 3, 3)
    for backend in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match="this operator has no such implementation"):
            ops.winograd_weights(weight, backend=backend)
        with pytest.raises(RuntimeError, match="this operator has no such implementation"):
            ops.winograd_conv3x3(weight, *ops.winograd_weights(weight, backend="eager"), backend=backend)


@pytest.mark.simulated
def test_the_simulation_is_what_runs() -> None:
    x = torch.rand(5)
    assert ops.selected_backend("cpu", "cuda") == "cuda"
    ops.pgd_step_linf(x, x, x, step_size=0.1, eps=0.1, backend="cuda")
    with pytest.raises(RuntimeError, match="'cpp' cannot run: the simulated CUDA kernels are in its place"):
        ops.pgd_step_linf(x, x, x, step_size=0.1, eps=0.1, backend="cpp")
    torch.library.opcheck(torch.ops.fastdynat.pgd_step_linf.default, (x, x, x, 0.1, 0.1, 0.0, 1.0))


def test_it_ends_with_the_test() -> None:
    x = torch.rand(5)
    with pytest.raises(RuntimeError, match="'cuda' cannot run: needs cuda tensors, got cpu"):
        ops.pgd_step_linf(x, x, x, step_size=0.1, eps=0.1, backend="cuda")


@pytest.mark.simulated
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pgd_step_linf_in_packs_and_without(
    dtype: torch.dtype, grad_dtype: torch.dtype, low: torch.dtype | None
) -> None:
    # 4 and 256 elements are packs, 257 are not; 3 * 17 * 20 are several blocks' work for one image.
    for shape in [(1, 4), (3, 256), (3, 257), (2, 3, 17, 20), (5, 1)]:
        x0 = torch.rand(shape, dtype=dtype)
        x, grad = x0 + 0.1 * torch.randn_like(x0), torch.randn(shape).to(grad_dtype)
        x.flatten()[::7], grad.flatten()[::5], grad.flatten()[::3], grad[0] = torch.nan, torch.nan, 0.0, 0.0
        for unaligned in (None, 0, 1, 2):
            args = [x, grad, x0]
            if unaligned is not None:
                t = args[unaligned]
                args[unaligned] = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(shape)
            kwargs = {"step_size": 0.05, "eps": 0.1, "low_dtype": low}
            found = ops.attack_step_linf(*args, **kwargs, backend="cuda")
            expected = ops.attack_step_linf(*args, **kwargs, backend="eager")
            assert not expected.moved[0]
            for a, b in zip(found, expected, strict=True):
                if b is not None:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
