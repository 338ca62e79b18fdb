"""Flags of device, precision and speed."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.config.switch import Switch

AutoAmp = Literal["default", "auto", "off", "bf16", "fp16"]
Kernels = Literal["auto", "eager", "cpp", "cuda", "triton"]
CompileMode = Literal["off", "auto", "default", "max-autotune"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Device, precision and speed."""

    device: str = "auto"
    """cpu, cuda, cuda:N; auto is a GPU if there is one."""
    amp: AutoAmp = "default"
    """Mixed precision, in the attack and in the update; auto, or a bare --amp, is the fastest precision on
    this machine; bf16 and fp16 force it; default is bf16 on a GPU that has it, else float32."""
    compile: CompileMode = "off"
    """torch.compile of the attack's step and of the trained networks; auto, or a bare --compile, is default
    where that is faster for this run on this machine, else off."""
    kernels: Kernels = "auto"
    """Implementation of the fused operators; auto is FASTDYNAT_KERNELS if it is set, else the fastest
    that is correct on this machine."""
    channels_last: Switch = "auto"
    """Channels-last memory format; auto is whichever is faster on this machine; a bare --channels-last is
    on."""
    fold: Switch = "auto"
    """Fold batch norm into the convolutions of the attacked network; auto is on if batch norm is in
    eval mode in the attack."""
    fused_conv: Switch = "auto"
    """Compute convolution, bias, residual and ReLU of the folded network in one cuDNN kernel; auto is on for
    a GPU, in the layers where it is not slower; on is every layer that has such a kernel. Not with
    --deterministic."""
    winograd: Switch = "auto"
    """Winograd's algorithm for the attacked network's 3x3 convolutions, in float32 on the CPU, in the layers
    where it is faster."""
    closed_form: bool = True
    """Compute the attack's gradient at the logits by formula instead of by autograd."""
    graphs: Switch = "auto"
    """Capture the training step as a CUDA graph; auto is on for a GPU."""
    guide_stream: Switch = "auto"
    """Run the guide on a separate CUDA stream, in parallel with the attack; auto is on for a GPU."""
    grad_checkpointing: bool = False
    """Activation checkpointing: updates store only the inputs of a network's blocks, and recompute
    activations in the backward pass. It saves memory and costs about one more forward pass; gradients stay
    the same. The attack is not affected."""
    check_fidelity: int = 0
    """At each validation, compare the engine's PGD on the cross-entropy with the eager float32 one on this
    many validation images; 0 is off."""
    boundary_speed: int = 0
    """At each validation, measure margins of this many validation images and how fast the updates move the
    decision boundary towards or away from them (L-inf); 0 is off. `fastdynat boundary RUN` draws them."""
    seed: int = 1
    """Seed of initialisation, data order, augmentation and attacks."""
    deterministic: bool = False
    """On a GPU, use only deterministic algorithms, the same ones in every process (slower). A resumed run
    then equals an uninterrupted one bit for bit on the same kind of GPU with the same versions; without this
    flag, the two agree within rounding. On the CPU they are always equal, given the same processor, number of
    threads and versions."""
    rank_timeout: float = 10.0
    """With several processes (torchrun), time limit in minutes for every rank to join the rendezvous and each
    collective. When it expires, the error names the missing rank and all processes end."""
