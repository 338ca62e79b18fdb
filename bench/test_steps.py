"""Attack and training step by pytest-benchmark, in float32 and bfloat16, to be tracked over time.

`fastdynat bench` compares them with peers and switch by switch. FASTDYNAT_BENCH_MODEL and
FASTDYNAT_BENCH_DEVICE choose.
"""

import os
from typing import Any

import pytest
import torch

from fastdynat.commands.bench.settings import resolved_setting
from fastdynat.commands.bench.work import Work, engine_attack, engine_step
from fastdynat.config import DataConfig, EngineConfig, ModelConfig, TrainConfig
from fastdynat.data import dataset_info
from fastdynat.data.random_images import random_split
from fastdynat.methods import DynatOptions

DEVICE = os.environ.get("FASTDYNAT_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
MODEL = os.environ.get("FASTDYNAT_BENCH_MODEL") or ("resnet18" if DEVICE == "cuda" else "small")
BATCH_SIZE = 128 if DEVICE == "cuda" else 32


def work(kind: str, amp: Any) -> Work:
    info = dataset_info("cifar10")
    assert info is not None
    asked = TrainConfig(
        options=DynatOptions(),
        data=DataConfig(data="cifar10", batch_size=BATCH_SIZE),
        model=ModelConfig(model=MODEL, guide=MODEL),
        engine=EngineConfig(device=DEVICE, amp=amp),
    )
    make = engine_attack if kind == "attack" else engine_step
    split = random_split(info, BATCH_SIZE, seed=1)
    return make(resolved_setting(asked, split), split)


@pytest.mark.parametrize("kind", ["attack", "step"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_step(benchmark: Any, kind: str, amp: str) -> None:
    benchmark.group = f"{kind}, {MODEL}, batch {BATCH_SIZE}"
    made = work(kind, amp)

    def run() -> None:
        made.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=7, warmup_rounds=5)
    assert made.finite()
