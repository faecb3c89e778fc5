"""Attention backends agree, and the choice between them is right on GPUs that are not here."""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from trainer.errors import UserError
from trainer.kernels import flash_attention
from trainer.kernels.attention_backends import AttentionBackend, BackendName, ByGradient, FlashAttention4, SdpaBackend
from trainer.kernels.compiler import configure_compiler
from trainer.kernels.flash_attention import cache_folder
from trainer.kernels.fusion import Fused
from trainer.kernels.windowed_attention import with_window
from trainer.model import kernel_choice
from trainer.model.attention import AttentionConfig
from trainer.model.config import TransformerConfig
from trainer.model.kernel_choice import Seconds, choose_attention, choose_fused
from trainer.model.mlp import MLPConfig

GPU = (128, torch.device("cuda"), torch.float16)


def choose(name: BackendName, *args, **options) -> AttentionBackend:
    return choose_attention(TransformerConfig(attention=AttentionConfig(backend=name)), *args, **options)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of the last positions in numpy, one head at a time."""
    batch, length, heads, dim = q.shape
    total, kv_heads = k.shape[1], k.shape[2]
    out = np.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = q[b, :, h] @ k[b, :, g].T / np.sqrt(dim)
            scores[np.arange(total)[None] > np.arange(total - length, total)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[b, :, h] = weights / weights.sum(1, keepdims=True) @ v[b, :, g]
    return out


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("backend", [SdpaBackend(), SdpaBackend("math"), SdpaBackend("math", copies_kv=True)])
def test_backends_equal_numpy(backend: SdpaBackend, length: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *shape, 8).double() for shape in ((length, 6), (9, 2), (9, 2)))
    assert np.allclose(backend(q, k, v).numpy(), attend(q.numpy(), k.numpy(), v.numpy()))


@dataclass(frozen=True)
class Scaled:
    """A backend that is recognized by what it returns."""

    factor: float
    copies_kv: bool = False

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.factor * q

    def describe(self) -> str:
        return f"times {self.factor}"


@pytest.mark.parametrize("is_compiled", [False, True])
def test_training_and_scoring_each_use_their_backend(is_compiled: bool):
    backend = ByGradient(Scaled(2.0, copies_kv=True), Scaled(3.0))
    call = torch.compile(backend, backend="eager", fullgraph=True) if is_compiled else backend
    q = torch.ones(1, 4, 2, 8)
    assert float(call(q, q, q)[0, 0, 0, 0]) == 2
    assert backend.copies_kv
    with torch.no_grad():
        assert float(call(q, q, q)[0, 0, 0, 0]) == 3
        assert not backend.copies_kv
    assert float(call(q, q, q)[0, 0, 0, 0]) == 2
    assert backend.describe() == "times 2.0; for scoring times 3.0"


def table(**seconds: float | tuple[float, float]):
    """A fake GPU that runs only these backends, each in so many seconds; the second number of two is for scoring."""

    def measure(backend: AttentionBackend, *_: object) -> Seconds | None:
        time = seconds.get(backend.describe().replace(", keys and values expanded", "_expanded"))
        return time and (Seconds(*time) if isinstance(time, tuple) else Seconds(time, time))

    return measure


def test_the_fastest_backend_that_runs_is_chosen():
    assert choose("auto", *GPU, measure=table(cudnn=0.003, flash=0.005, math=0.1)).describe() == "cudnn"
    assert choose("auto", *GPU, measure=table(cudnn=0.005, flash=0.003, math=0.1)).describe() == "flash"
    assert choose("efficient", *GPU, measure=table(cudnn=0.003, efficient=0.2)).describe() == "efficient"


def test_the_fastest_forward_pass_is_chosen_for_scoring():
    chosen = choose("auto", *GPU, measure=table(cudnn=(0.003, 0.002), flash=(0.004, 0.001), math=(0.1, 0.1)))
    assert chosen == ByGradient(SdpaBackend("cudnn"), SdpaBackend("flash"))
    windows = with_window(chosen, 64)
    assert windows == ByGradient(with_window(SdpaBackend("cudnn"), 64), with_window(SdpaBackend("flash"), 64))


def test_the_unfused_backend_is_tried_only_where_no_other_runs():
    assert choose("auto", *GPU, measure=table(cudnn=0.2, math=0.1)).describe() == "cudnn"
    assert choose("auto", *GPU, measure=table(math=0.1)).describe() == "math"


def test_keys_are_expanded_before_a_slower_backend_is_chosen():
    """An older GPU: no cuDNN, and flash has no grouped queries."""
    chosen = choose("auto", *GPU, measure=table(flash_expanded=0.005, efficient_expanded=0.007, math=0.1))
    assert chosen.describe() == "flash, keys and values expanded"


def test_the_optional_package_is_tried_with_and_without_copies_of_keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_choice, "is_installed", lambda: True)
    assert choose("auto", *GPU, measure=table(fa4=0.003, fa4_expanded=0.002)) == FlashAttention4(copies_kv=True)
    assert choose("auto", *GPU, measure=table(fa4=0.002, fa4_expanded=0.003)) == FlashAttention4()
    assert with_window(FlashAttention4(copies_kv=True), 64) == FlashAttention4(64, copies_kv=True)


def test_a_warning_names_an_optional_package_that_is_installed_but_does_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_choice, "is_installed", lambda: True)
    with pytest.warns(UserWarning, match="flash-attn-4 is installed but does not run"):
        assert choose("auto", *GPU, measure=table(cudnn=2.0)).describe() == "cudnn"


def test_the_optional_package_is_tried_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_choice, "is_installed", lambda: True)
    assert choose("auto", *GPU, measure=table(fa4=0.002, cudnn=0.003)).describe() == "fa4"
    monkeypatch.setattr(kernel_choice, "is_installed", lambda: False)
    assert choose("auto", *GPU, measure=table(fa4=0.002, cudnn=0.003)).describe() == "cudnn"
    with pytest.raises(UserError, match="flash-attn-4"):
        choose("fa4", *GPU, measure=table(fa4=0.002))


def test_windows_count_as_often_as_blocks_have_them(monkeypatch: pytest.MonkeyPatch):
    """cuDNN may win with full attention and lose by the cost of the mask of a window."""
    monkeypatch.setattr(kernel_choice, "is_installed", lambda: True)

    def measure(backend: AttentionBackend, *_: object) -> Seconds | None:
        if isinstance(backend, FlashAttention4):
            return Seconds(*2 * [0.001 if backend.window else 0.003])
        if backend.describe() != "cudnn":
            return None
        return Seconds(*2 * [0.002 if isinstance(backend, SdpaBackend) else 0.005])

    def chosen(window: int | None, window_pattern: str) -> str:
        attention = AttentionConfig(window=window, window_pattern=window_pattern)
        return choose_attention(TransformerConfig(num_layers=6, attention=attention), *GPU, measure=measure).describe()

    assert chosen(None, "SSL") == "cudnn"
    assert chosen(64, "SSL") == "fa4"
    assert chosen(64, "L") == "cudnn"


def test_blocks_with_value_embeddings_are_timed_with_them():
    timed = []

    def measure(backend: AttentionBackend, has_value_embedding: bool, _: bool) -> Seconds | None:
        timed.append((backend.describe(), has_value_embedding))
        time = {"cudnn": 0.002 + 0.01 * has_value_embedding, "flash": 0.003}.get(backend.describe())
        return time and Seconds(time, time)

    plain, embedded = (TransformerConfig(num_layers=9, value_embedding_blocks=count) for count in (None, 2))
    assert choose_attention(plain, *GPU, measure=measure).describe() == "cudnn"
    assert choose_attention(embedded, *GPU, measure=measure).describe() == "flash"
    assert ("cudnn", True) in timed


def test_a_named_backend_that_does_not_run_is_refused_by_name():
    with pytest.raises(UserError, match="'cudnn' does not run"):
        choose("cudnn", *GPU, measure=table(flash=0.005))
    with pytest.raises(UserError, match="needs a CUDA device"):
        choose("flash", 128, torch.device("cpu"), torch.float32)


def test_a_cpu_lets_torch_choose():
    assert choose("auto", 128, torch.device("cpu"), torch.float32) == SdpaBackend()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_the_compile_cache_holds_one_graph_per_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    configure_compiler()
    q = torch.randn(1, 8, 2, 16)

    def cache_counters(backend: str) -> dict[str, int]:
        torch._dynamo.reset()
        counters.clear()
        assert torch.compile(SdpaBackend(backend), fullgraph=True)(q, q, q).shape == q.shape
        return {key: count for key, count in counters["aot_autograd"].items() if key.startswith("autograd_cache")}

    assert [cache_counters(name) for name in ("math", "flash", "math")] == [
        {"autograd_cache_miss": 1, "autograd_cache_saved": 1},
        {"autograd_cache_miss": 1, "autograd_cache_saved": 1},
        {"autograd_cache_hit": 1},
    ]


def test_a_function_may_have_many_graphs():
    """Shapes, gradients, the loop and a model of each stage of an export make more than torch's limit of 8."""

    def count(limit: int | None) -> int:
        torch._dynamo.reset()
        configure_compiler()
        with torch._dynamo.config.patch(recompile_limit=limit) if limit else nullcontext():
            double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True, dynamic=False)
            return sum(len(double(torch.ones(size))) == size for size in range(1, 20))

    with pytest.raises(Exception, match="Hard failure"):
        count(8)
    assert count(None) == 19


def test_a_kernel_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise ImportError("libcute.so: undefined symbol: x\nmore")

    monkeypatch.setattr(flash_attention, "interface", broken)
    reason = "ImportError: libcute.so: undefined symbol: x"
    assert flash_attention.why_not(64, torch.device("cpu"), torch.bfloat16) == reason
    monkeypatch.setattr(kernel_choice, "is_installed", lambda: True)
    monkeypatch.setattr(kernel_choice, "why_not", lambda *_: reason)
    with pytest.warns(UserWarning, match=f"does not run here: {reason}. These versions were tested"):
        choose("auto", *GPU, measure=table(cudnn=0.005))


@dataclass(frozen=True)
class NewMLP(MLPConfig):
    """An MLP with an option that nobody knew when the kernel was written."""

    activation: str = "relu_squared"


@dataclass(frozen=True)
class NewAttention(AttentionConfig):
    """Attention with such an option."""

    new_gate: float | None = None


@dataclass(frozen=True)
class NewModel(TransformerConfig):
    """A model with such an option."""

    z_loss: float = 0.0


def test_a_fused_operator_is_only_taken_for_settings_it_knows(monkeypatch: pytest.MonkeyPatch):
    for module in (kernel_choice.fused_mlp, kernel_choice.fused_heads, kernel_choice.fused_loss):
        monkeypatch.setattr(module, "runs_on", lambda *_: True)
    for mlp, attention, expected in (
        (NewMLP(ratio=5), NewAttention(xsa=True), (True, True, True)),
        (NewMLP(activation="gelu"), NewAttention(), (False, True, True)),
        (NewMLP(), NewAttention(new_gate=1.0), (True, False, True)),
    ):
        assert choose_fused(TransformerConfig(mlp=mlp, attention=attention), GPU[1], GPU[2]) == expected
    for z_loss, expected in ((0.0, (True, True, True)), (1e-4, (False, False, False))):
        assert choose_fused(NewModel(z_loss=z_loss), GPU[1], GPU[2]) == expected
        assert kernel_choice.supported_fused(NewModel(z_loss=z_loss), torch.device("cpu"), GPU[2]) == Fused()
    lists = kernel_choice.FUSED_HEADS, kernel_choice.FUSED_MLP, kernel_choice.MODEL
    for names, config in zip(lists, (AttentionConfig, MLPConfig, TransformerConfig), strict=True):
        assert set(names) == {field.name for field in fields(config)}


def test_flash_attention_caches_what_it_compiles_where_files_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = cache_folder()
    assert folder == tmp_path / "caches/golf-trainer/flash-attn-4"
    assert folder.is_dir()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() is None
