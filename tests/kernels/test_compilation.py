"""The Triton kernels compile for GPUs that this machine need not have; what they compute is tested elsewhere."""

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from trainer.kernels import fused_heads_triton, fused_loss_triton, fused_mlp_triton

HOPPER, AMPERE, TURING = 90, 80, 75  # compute capabilities
HALF, BRAIN = torch.float16, torch.bfloat16


def loss(dtype: torch.dtype, excludes: bool) -> None:
    logits, targets, sums = torch.zeros(4, 8192, dtype=dtype), torch.zeros(4, dtype=torch.int64), torch.ones(4)
    pairs = (None, None)
    if excludes:
        pairs = torch.zeros(4, dtype=torch.int32), torch.zeros(8192, 8192, dtype=torch.bool)
    fused_loss_triton.forward(logits, targets, 15.0, *pairs)
    fused_loss_triton.backward(sums, logits, targets, sums, 15.0, *pairs)


def heads(dtype: torch.dtype, has_offset: bool) -> None:
    offset_from = 16 if has_offset else None
    qkv, tables, gain = torch.zeros(2, 64, 8, 128, dtype=dtype), torch.zeros(2, 64, 128), torch.ones(4)
    q, k, v = fused_heads_triton.qk_norm_rope(qkv, tables, gain, 2, 1e-6, 1, offset_from)
    fused_heads_triton.qk_norm_rope_backward(q, k, v, qkv, tables, gain, 1e-6, offset_from)
    for factor in (None, q[..., 0].contiguous()):
        fused_heads_triton.xsa(q, v, factor)
        fused_heads_triton.xsa_backward(q, q, v, factor)


def mlp(dtype: torch.dtype, is_backward: bool) -> None:
    a, b = torch.zeros(256, 512, dtype=dtype), torch.zeros(2048, 512, dtype=dtype)
    fused_mlp_triton.product(a, b, torch.zeros(256, 2048, dtype=dtype) if is_backward else None)


@pytest.mark.parametrize(
    ("kernels", "count", "target", "dtype"),
    [
        *((loss, 2, *gpu) for gpu in ((HOPPER, BRAIN), (AMPERE, BRAIN), (TURING, HALF))),
        *((heads, 6, *gpu) for gpu in ((HOPPER, BRAIN), (AMPERE, BRAIN), (TURING, HALF))),
        (mlp, 1, HOPPER, BRAIN),
    ],
)
@pytest.mark.parametrize("variant", [False, True])
def test_kernels_compile(
    kernels: Callable, count: int, target: int, dtype: torch.dtype, variant: bool, monkeypatch: pytest.MonkeyPatch
):
    compiled = []
    monkeypatch.setattr(
        driver,
        "_active",
        SimpleNamespace(
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", target, 32),
        ),
    )
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    kernels(dtype, variant)
    assert len(compiled) == count
    assert all(kernel.asm["cubin"] for kernel in compiled)
