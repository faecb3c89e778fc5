"""FlashAttention-4 (Shah et al. 2024 and its successors) as an operator that torch.compile takes whole.

The package `flash-attn-4` is optional; it runs on Hopper and newer. torch has a hook for it
(`torch.nn.attention.activate_flash_attention_impl`), but that of torch 2.11 cannot call the package's current version.
"""

import fcntl
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INTERFACE = "flash_attn.cute.interface"  # imported on first use: it takes seconds and needs a GPU's driver
SETTING = "FLASH_ATTENTION_CUTE_DSL_CACHE"


def is_installed() -> bool:
    """Whether the package is installed; it may still not run on this GPU."""
    return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None


def cache_folder() -> Path | None:
    """Where the package caches what it compiles: the user's cache folder, if files can be made and locked there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "golf-trainer" / "flash-attn-4"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return folder


@cache
def interface() -> ModuleType:
    """The package, told to cache what it compiles (5 s per head width and window) unless the user configured that."""
    if not any(name.startswith(SETTING) for name in os.environ) and (folder := cache_folder()):
        os.environ[f"{SETTING}_ENABLED"], os.environ[f"{SETTING}_DIR"] = "1", str(folder)
    return import_module(INTERFACE)


def why_not(head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """The first line of what keeps the package from running, or None if it runs."""
    try:
        q = torch.randn(1, 128, 1, head_dim, device=device, dtype=dtype)
        flash_attention(q, q, q)
    except Exception as error:  # whatever a package can raise that was built for something else
        return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    return None


@torch.library.custom_op("golf_trainer::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """Causal attention with native grouped queries.

    Args:
        q: (B, S, H, d), the last S of T positions, float16 or bfloat16.
        k: (B, T, K, d).
        v: (B, T, K, d).
        window: Attention window in tokens, the position itself included; 0: full attention.

    Returns:
        (B, S, H, d) of the same type, and the float32 log-sum-exp of the scores, (B, H, S).
    """
    out, lse, *_ = interface()._flash_attn_fwd(q, k, v, return_lse=True, **_mask_options(window))
    return out, lse


@flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("golf_trainer::flash_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = interface()._flash_attn_bwd(q, k, v, out, grad, lse, **_mask_options(window))
    return dq, dk, dv


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _mask_options(window: int) -> dict[str, Any]:
    return {"causal": True, "window_size_left": window - 1} if window else {"causal": True}


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dq, dk, dv = _backward(*ctx.saved_tensors, grad.contiguous(), ctx.window)
    return dq, dk, dv, None


flash_attention.register_autograd(_differentiate, setup_context=_save)
