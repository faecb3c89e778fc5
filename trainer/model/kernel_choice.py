"""Which kernels compute the model on this device: the fused operators and the fastest attention that really run."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from trainer.device import synchronize
from trainer.errors import UserError
from trainer.kernels import fused_heads, fused_loss, fused_mlp
from trainer.kernels.attention_backends import BACKENDS, AttentionBackend, ByGradient, FlashAttention4, SdpaBackend
from trainer.kernels.flash_attention import is_installed, why_not
from trainer.kernels.fusion import Fused
from trainer.kernels.windowed_attention import with_window
from trainer.model.attention import Attention, rotary_tables
from trainer.model.config import TransformerConfig

PROBE_TOKENS = 131_072
# The settings that the fused operators compute, or that they leave to the code around them. One that is not listed is
# new: where it is switched on, they would ignore it in silence.
MODEL = (
    *("vocab_size", "num_layers", "model_dim", "attention", "mlp", "bigram", "smear", "loop", "value_embedding_blocks"),
    *("tied_embeddings", "embedding_init_std", "logit_softcap", "fused"),
)
FUSED_MLP = ("ratio",)
FUSED_HEADS = [
    "num_heads",
    "num_kv_heads",
    "qk_gain_init",
    "rope_base",
    "rope_dims",
    "key_offset",
    "xsa",
    "gate_dims",
    "window",
    "window_pattern",
    "backend",
]


def is_known(config: Any, names: Sequence[str]) -> bool:
    """Whether every setting of a config that is not among these names has its default.

    Args:
        config: A dataclass that can be made without arguments.
        names: Names of its settings.
    """
    default = type(config)()
    others = [field.name for field in fields(config) if field.name not in names]
    return all(getattr(config, name) == getattr(default, name) for name in others)


def supported_fused(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Fused:
    """The fused operators that model, device and type allow; whether they run is not tried.

    Args:
        config: The model.
        device: Where it runs.
        dtype: Type of the activations.
    """
    if device.type != "cuda" or find_spec("triton") is None or not is_known(config, MODEL):
        return Fused()
    return Fused(
        is_known(config.mlp, FUSED_MLP) and fused_mlp.is_supported(device, dtype),
        is_known(config.attention, FUSED_HEADS) and fused_heads.is_supported(config.heads[2], dtype),
        fused_loss.is_supported(config.logit_softcap, dtype),
    )


def choose_fused(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, runs: Mapping[str, bool] | None = None
) -> Fused:
    """Try every fused operator forward and backward, unless the config forbids them.

    Args:
        config: The model; its `fused` is the choice.
        device: Where the model runs.
        dtype: Type of the activations.
        runs: Which operators run, by name; None: they are tried, which takes seconds.

    Raises:
        UserError: If they are demanded and one does not run.
    """
    if config.fused == "off":
        return Fused()
    if device.type != "cuda" or not is_known(config, MODEL):
        fused = Fused()
    elif runs is not None:
        fused = Fused(**runs)
    else:
        widths = config.model_dim, config.mlp.ratio * config.model_dim
        fused = Fused(
            is_known(config.mlp, FUSED_MLP) and fused_mlp.runs_on(widths, device, dtype),
            is_known(config.attention, FUSED_HEADS) and fused_heads.runs_on(config.heads, device, dtype),
            fused_loss.runs_on(config.logit_softcap, device, dtype),
        )
    if config.fused == "on" and not all(fused):
        missing = ", ".join(name for name, runs_here in fused._asdict().items() if not runs_here)
        raise UserError(
            f"model.fused 'on': these do not run on {device.type} in {dtype} with this model: {missing}; use auto, "
            "which takes those that run (--help says what each needs)"
        )
    return fused


class Seconds(NamedTuple):
    """Time of a backend: forward and backward, and forward where no gradients are wanted."""

    training: float
    scoring: float


Measure = Callable[[AttentionBackend, bool, bool], Seconds | None]


def candidates(name: str) -> Iterator[list[AttentionBackend]]:
    """Backends to try; of each list the first that runs counts, because the next is the same with more work.

    A kernel without native grouped queries gets expanded keys and values: the published port fell back to the unfused
    `math` kernel for good.
    """
    if name in ("auto", "fa4") and is_installed():
        yield [FlashAttention4()]
        yield [FlashAttention4(copies_kv=True)]  # which is faster depends on the heads
    for backend in BACKENDS:
        if name in ("auto", backend):
            yield [SdpaBackend(backend), SdpaBackend(backend, copies_kv=True)]


def choose_attention(
    config: TransformerConfig,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    has_fused_heads: bool = False,
    measure: Measure | None = None,
) -> AttentionBackend:
    """Run attention with every backend and take the fastest for all blocks together, for training and for scoring.

    Args:
        config: The model; the backend of its attention is the choice.
        length: Tokens of a sequence.
        device: Where it will run.
        dtype: Type of the activations.
        has_fused_heads: Whether fused operators compute QK-norm, RoPE and XSA.
        measure: Seconds of a backend, with or without value embeddings and key offset, or None if it does not run; for
            tests.

    Raises:
        UserError: If the backend that is named does not run here.
    """
    name = config.attention.backend
    if device.type != "cuda":
        if name not in ("auto", "math"):
            raise UserError(f"model.attention.backend {name!r} needs a CUDA device, not {device.type}; use auto")
        return SdpaBackend("math" if name == "math" else None)
    if name == "fa4" and not is_installed():
        raise UserError("model.attention.backend 'fa4' needs the package flash-attn-4; install it or use auto")
    measure = measure or partial(
        time_attention, config=config, length=length, device=device, dtype=dtype, has_fused_heads=has_fused_heads
    )
    kinds = Counter(
        (
            config.attention.window_of(block),
            config.has_value_embedding(block),
            config.attention.has_key_offset(block),
        )
        for block in config.block_order()
    )
    seconds: dict[AttentionBackend, Seconds] = {}
    for variants in candidates(name):
        if seconds and variants[0] == SdpaBackend("math"):
            break  # it materializes all scores: seconds and tens of GiB to find out that any other is faster
        for backend in variants:
            timings = [
                (count, measure(with_window(backend, window) if window else backend, has_values, has_offset))
                for (window, has_values, has_offset), count in kinds.items()
            ]
            if all(timing is not None for _, timing in timings):
                known = [(count, timing) for count, timing in timings if timing is not None]
                seconds[backend] = Seconds(
                    sum(count * timing.training for count, timing in known),
                    sum(count * timing.scoring for count, timing in known),
                )
                break
    if name == "auto" and is_installed() and not any(isinstance(backend, FlashAttention4) for backend in seconds):
        reason = why_not(config.heads[2], device, dtype) or "it does not support these heads"
        warnings.warn(
            f"flash-attn-4 is installed but does not run here: {reason}. These versions were tested together: "
            "pip install 'golf-trainer[flash-attn]'",
            stacklevel=2,
        )
    if not seconds:
        raise UserError(f"model.attention.backend {name!r} does not run on this device in {dtype}; use auto")
    training = min(seconds, key=lambda backend: seconds[backend].training)
    scoring = min(seconds, key=lambda backend: seconds[backend].scoring)
    return training if scoring == training else ByGradient(training, scoring)


def time_attention(
    backend: AttentionBackend,
    has_value_embedding: bool,
    has_key_offset: bool,
    config: TransformerConfig,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    has_fused_heads: bool,
) -> Seconds | None:
    """Time the attention of one block, None if it does not run; the arguments are those of `choose_attention`."""
    _, kv_heads, head_dim = config.heads
    attention = Attention(config.attention, config.model_dim, has_value_embedding, has_key_offset).to(device)
    attention.backend, attention.is_fused = backend, has_fused_heads
    batch = max(1, PROBE_TOKENS // length)
    x = torch.randn(batch, length, config.model_dim, device=device, dtype=dtype).requires_grad_()
    values = torch.randn(batch, length, kv_heads, head_dim, device=device, dtype=dtype) if has_value_embedding else None
    rotary = rotary_tables(length, head_dim, config.attention.rope_base, device, config.attention.rope_dims)
    scale, grad = torch.ones(config.model_dim, device=device), torch.randn_like(x)

    def attend() -> torch.Tensor:
        return attention(x, rotary, scale, value_embeddings=values)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA explains its refusals, which answer the probe and not the user
            training = _fastest(lambda: torch.autograd.grad(attend(), x, grad), device)
            with torch.no_grad():
                scoring = _fastest(attend, device)
                is_finite = bool(attend().isfinite().all())
    except Exception:  # out of memory, SDPA's refusal, an extra that does not import or compile
        return None
    return Seconds(training, scoring) if is_finite else None


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Shortest seconds of a call: the first one compiles, and other processes may use this GPU for a moment."""
    seconds = []
    for steps in (1, 5, 5, 5):  # enough in a row to hide the work of the host
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - started) / steps)
    return min(seconds)
