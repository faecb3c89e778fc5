"""Which kernel computes attention on this device: the fastest one that really runs."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.errors import UserError
from trainer.model.flash_attention import flash_attention, is_installed

BackendName = Literal["auto", "fa4", "cudnn", "flash", "efficient", "math"]
BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PROBE_TOKENS = 131_072


class AttentionKernel(Protocol):
    """Causal attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: (B, S, H, d), queries of the last S positions.
            k: (B, T, K, d), keys of all positions; H is a multiple of K.
            v: (B, T, K, d).

        Returns:
            (B, S, H, d).
        """
        ...

    def describe(self) -> str:
        """The kernel in words, for the log."""
        ...


@dataclass(frozen=True)
class SdpaKernel:
    """torch's scaled_dot_product_attention.

    Attributes:
        backend: Name in BACKENDS, or None to let torch choose (on the CPU).
        expand_kv: Repeat keys and values per query head first, for kernels without native grouped queries.
    """

    backend: str | None = None
    expand_kv: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionKernel."""
        if q.size(1) < k.size(1):
            return _last_positions(q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, d)
        groups = q.size(1) // k.size(1)
        if self.expand_kv and groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        gqa = k.size(1) != q.size(1)
        if self.backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)
        with sdpa_kernel(BACKENDS[self.backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    def describe(self) -> str:
        """See AttentionKernel."""
        return f"{self.backend or 'torch chooses'}{', keys and values expanded' if self.expand_kv else ''}"


def _last_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Few queries over many keys, with a mask: torch's causal flag would align the first query with the first key."""
    batch, length, heads, dim = q.shape
    total, kv_heads = k.size(1), k.size(2)
    # The query heads of a group as further queries of their key head: no copy of keys and values.
    q = q.view(batch, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    mask = mask.repeat(heads // kv_heads, 1)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    y = y.view(batch, kv_heads, heads // kv_heads, length, dim).permute(0, 3, 1, 2, 4)  # (B, S, K, H / K, d)
    return y.reshape(batch, length, heads, dim)


@dataclass(frozen=True)
class FlashAttention4:
    """The optional package flash-attn-4.

    Attributes:
        window: Tokens that a position looks back at, itself included; None: all.
    """

    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionKernel."""
        return flash_attention(q, k, v, self.window or 0)[0]

    def describe(self) -> str:
        """See AttentionKernel."""
        return "fa4"


def candidates(name: str) -> Iterator[list[AttentionKernel]]:
    """Kernels to try; of each list the first that runs counts, because the next is the same with more work.

    A kernel without native grouped queries gets expanded keys and values: the published port fell back to the unfused
    `math` kernel for good.
    """
    if name in ("auto", "fa4") and is_installed():
        yield [FlashAttention4()]
    for backend in BACKENDS:
        if name in ("auto", backend):
            yield [SdpaKernel(backend), SdpaKernel(backend, expand_kv=True)]


def choose_kernel(
    name: BackendName,
    heads: tuple[int, int, int],
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    measure: "Measure | None" = None,
) -> AttentionKernel:
    """Run every kernel forward and backward at these shapes and take the fastest.

    Args:
        name: A backend, or auto.
        heads: Query heads, key heads, width of a head.
        length: Tokens of a sequence.
        device: Where it will run.
        dtype: Type of the activations.
        measure: Seconds of a kernel, or None if it does not run; for tests.

    Raises:
        UserError: If the backend that is named does not run here.
    """
    if device.type != "cuda":
        if name not in ("auto", "math"):
            raise UserError(f"model.attention.backend {name!r} needs a CUDA device, not {device.type}; use auto")
        return SdpaKernel("math" if name == "math" else None)
    if name == "fa4" and not is_installed():
        raise UserError("model.attention.backend 'fa4' needs the package flash-attn-4; install it or use auto")
    seconds: dict[AttentionKernel, float] = {}
    for variants in candidates(name):
        for kernel in variants:
            taken = (measure or time_kernel)(kernel, heads, length, device, dtype)
            if taken is not None:
                seconds[kernel] = taken
                break
    if name == "auto" and is_installed() and FlashAttention4() not in seconds:
        warnings.warn("flash-attn-4 is installed but does not run here: import flash_attn.cute says why", stacklevel=2)
    if not seconds:
        raise UserError(f"model.attention.backend {name!r} does not run on this device in {dtype}; use auto")
    return min(seconds, key=lambda kernel: seconds[kernel])


def let_graphs_be_stored() -> None:
    """Let torch's compile cache keep graphs that choose a kernel.

    It refuses two functions of `sdpa_kernel`, although their arguments are part of the graph and so of its key. Without
    this, every start traces and partitions the graphs anew: 10 s of the reference model's warm-up.
    """
    from torch._inductor import config  # noqa: PLC0415 - takes a second, which only a run that compiles has to spend

    names = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")
    config.unsafe_marked_cacheable_functions |= dict.fromkeys(names, torch.__version__)


Measure = Callable[[AttentionKernel, tuple[int, int, int], int, torch.device, torch.dtype], float | None]


def time_kernel(
    kernel: AttentionKernel, heads: tuple[int, int, int], length: int, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Seconds of one forward and backward, or None if the kernel does not run; see `choose_kernel`."""
    queries, keys, width = heads
    batch = max(1, PROBE_TOKENS // length)
    q, k, v = (
        torch.randn(batch, length, count, width, device=device, dtype=dtype).requires_grad_()
        for count in (queries, keys, keys)
    )
    grad = torch.randn_like(q)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA says why it refuses: an answer to the probe, not to the user
            for steps in (1, 3, 10):  # the first compiles, the last counts: long enough to hide what the host does
                torch.cuda.synchronize(device)
                started = time.perf_counter()
                for _ in range(steps):
                    out = kernel(q, k, v)
                    torch.autograd.grad(out, (q, k, v), grad)
                torch.cuda.synchronize(device)
                seconds = (time.perf_counter() - started) / steps
    except Exception:  # out of memory, SDPA's refusal, an extra that does not import or compile: it cannot be used
        return None
    return seconds if bool(out.isfinite().all()) else None
