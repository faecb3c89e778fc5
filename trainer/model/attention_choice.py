"""Which kernel computes attention on this device: the fastest one that really runs."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from trainer.errors import UserError
from trainer.model.attention import Attention, rotary_tables
from trainer.model.attention_kernel import BACKENDS, AttentionKernel, ByGradient, FlashAttention4, SdpaKernel
from trainer.model.banded_attention import with_window
from trainer.model.flash_attention import is_installed
from trainer.model.transformer import TransformerConfig

PROBE_TOKENS = 131_072


class Seconds(NamedTuple):
    """What a kernel takes: forward and backward, and forward where no gradients are wanted."""

    training: float
    scoring: float


def candidates(name: str) -> Iterator[list[AttentionKernel]]:
    """Kernels to try; of each list the first that runs counts, because the next is the same with more work.

    A kernel without native grouped queries gets expanded keys and values: the published port fell back to the unfused
    `math` kernel for good.
    """
    if name in ("auto", "fa4") and is_installed():
        yield [FlashAttention4()]
        yield [FlashAttention4(expand_kv=True)]  # which is faster depends on the heads
    for backend in BACKENDS:
        if name in ("auto", backend):
            yield [SdpaKernel(backend), SdpaKernel(backend, expand_kv=True)]


def choose_kernel(
    config: TransformerConfig,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    fused_heads: bool = False,
    measure: "Measure | None" = None,
) -> AttentionKernel:
    """Run attention with every kernel and take the fastest for all blocks together, to train and to score.

    Args:
        config: Of the model; the backend of its attention is the choice.
        length: Tokens of a sequence.
        device: Where it will run.
        dtype: Type of the activations.
        fused_heads: Whether heads are made by operators of their own.
        measure: Seconds of a kernel, or None if it does not run; for tests.

    Raises:
        UserError: If the backend that is named does not run here.
    """
    name = config.attention.backend
    if device.type != "cuda":
        if name not in ("auto", "math"):
            raise UserError(f"model.attention.backend {name!r} needs a CUDA device, not {device.type}; use auto")
        return SdpaKernel("math" if name == "math" else None)
    if name == "fa4" and not is_installed():
        raise UserError("model.attention.backend 'fa4' needs the package flash-attn-4; install it or use auto")
    measure = measure or partial(
        time_kernel, config=config, length=length, device=device, dtype=dtype, fused_heads=fused_heads
    )
    kinds = Counter((config.attention.window_of(block), config.has_token_values(block)) for block in config.order())
    seconds: dict[AttentionKernel, Seconds] = {}
    for variants in candidates(name):
        if seconds and variants[0] == SdpaKernel("math"):
            break  # it writes out all scores: seconds and tens of GiB to find out that any other is faster
        for kernel in variants:
            taken = [
                (count, measure(with_window(kernel, window) if window else kernel, has_token_values))
                for (window, has_token_values), count in kinds.items()
            ]
            if all(each is not None for _, each in taken):
                known = [(count, each) for count, each in taken if each is not None]
                seconds[kernel] = Seconds(
                    sum(count * each.training for count, each in known),
                    sum(count * each.scoring for count, each in known),
                )
                break
    if name == "auto" and is_installed() and not any(isinstance(kernel, FlashAttention4) for kernel in seconds):
        warnings.warn(
            "flash-attn-4 is installed but does not run here with these heads; import flash_attn.cute may say why",
            stacklevel=2,
        )
    if not seconds:
        raise UserError(f"model.attention.backend {name!r} does not run on this device in {dtype}; use auto")
    training = min(seconds, key=lambda kernel: seconds[kernel].training)
    scoring = min(seconds, key=lambda kernel: seconds[kernel].scoring)
    return training if scoring == training else ByGradient(training, scoring)


Measure = Callable[[AttentionKernel, bool], Seconds | None]


def time_kernel(
    kernel: AttentionKernel,
    has_token_values: bool,
    config: TransformerConfig,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    fused_heads: bool,
) -> Seconds | None:
    """Time a block's attention, None if it does not run; see `choose_kernel`."""
    _, kv_heads, width = config.heads
    attention = Attention(config.attention, config.model_dim, has_token_values).to(device)
    attention.kernel, attention.is_fused = kernel, fused_heads
    batch = max(1, PROBE_TOKENS // length)
    x = torch.randn(batch, length, config.model_dim, device=device, dtype=dtype).requires_grad_()
    values = torch.randn(batch, length, kv_heads, width, device=device, dtype=dtype) if has_token_values else None
    rotary = rotary_tables(length, width, config.attention.rope_base, device, config.attention.rope_dims)
    scale, grad = torch.ones(config.model_dim, device=device), torch.randn_like(x)

    def attend() -> torch.Tensor:
        return attention(x, rotary, scale, token_values=values)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA says why it refuses: an answer to the probe, not to the user
            training = _fastest(lambda: torch.autograd.grad(attend(), x, grad), device)
            with torch.no_grad():
                scoring = _fastest(attend, device)
                is_finite = bool(attend().isfinite().all())
    except Exception:  # out of memory, SDPA's refusal, an extra that does not import or compile: it cannot be used
        return None
    return Seconds(training, scoring) if is_finite else None


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; the first compiles, and others may use this GPU for a moment."""
    taken = []
    for steps in (1, 5, 5, 5):  # enough at once to hide what the host does
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            call()
        torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - started) / steps)
    return min(taken)
