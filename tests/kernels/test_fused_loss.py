"""Softcapped cross-entropy as one operator, against torch's cross-entropy of capped logits."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import TINY
from trainer.kernels import fused_loss
from trainer.kernels.attention_backends import SdpaBackend
from trainer.kernels.fused_loss import softcapped_nll
from trainer.kernels.fusion import Fused
from trainer.model.transformer import Transformer

CPU = torch.device("cpu")
# Without a GPU, Triton's interpreter runs the kernels: TRITON_INTERPRET=1, and the package triton.
HERE = torch.device("cuda") if torch.cuda.is_available() else CPU
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.bfloat16]  # it is slow
CAN_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def forward(logits: Tensor, targets: Tensor, cap: float, previous, excluded) -> tuple[Tensor, Tensor]:
    """What the kernel computes, as formulas: how far each logit stays below the cap."""
    below = 2 * cap / (1 + (2 * logits / cap).exp())
    kept = 1.0 if excluded is None else (~excluded[previous.long()]).double()
    sums = ((-below).exp() * kept).sum(1)
    at_target = below.gather(1, targets[:, None])[:, 0]
    return sums.log() + at_target, sums


def backward(grad: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, cap: float, previous, excluded) -> Tensor:
    """Its derivative as the kernel computes it."""
    r = 1 / (1 + (2 * logits / cap).exp())
    kept = 1.0 if excluded is None else (~excluded[previous.long()]).double()
    wrong = (-2 * cap * r).exp() * kept / sums[:, None]
    wrong = wrong - (torch.arange(logits.size(1), device=logits.device) == targets[:, None]).to(wrong.dtype)
    return grad[:, None] * wrong * 4 * r * (1 - r)


def torchs(logits: Tensor, targets: Tensor, cap: float, previous=None, excluded=None) -> Tensor:
    capped = cap * torch.tanh(logits / cap)
    if excluded is not None:
        capped = capped.masked_fill(excluded[previous], float("-inf"))
    return F.cross_entropy(capped, targets, reduction="none")


def some_pairs(targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The token before each target, and excluded pairs without those of the targets."""
    generator = torch.Generator().manual_seed(1)
    previous = torch.randint(0, vocab_size, targets.shape, generator=generator).to(targets)
    excluded = (torch.rand(vocab_size, vocab_size, generator=generator) < 0.3).to(targets.device)
    excluded[previous, targets] = False
    return previous, excluded


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, fused_loss.TRITON, SimpleNamespace(forward=forward, backward=backward))


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("excludes", [False, True])
def test_operator_and_its_derivative_equal_torchs(excludes: bool):
    torch.manual_seed(0)
    logits = (20 * torch.randn(9, 30, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 30, (9,))
    pairs = some_pairs(targets, 30) if excludes else ()
    nll = softcapped_nll(logits, targets, 15.0, *pairs)[0]
    torch.testing.assert_close(nll, torchs(logits, targets, 15.0, *pairs), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: softcapped_nll(x, targets, 15.0, *pairs)[0], logits)


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("start_pos", [0, 5])
@pytest.mark.parametrize("excludes", [False, True])
def test_loss_and_gradients_of_the_model_are_the_same_with_it(start_pos: int, excludes: bool):
    torch.manual_seed(0)
    model = Transformer(TINY).double()
    tokens = torch.randint(0, 300, (2, 9))
    results = []
    excluded = torch.rand(300, 300) < 0.3 if excludes else None
    if excluded is not None:
        excluded[tokens[:, :-1], tokens[:, 1:]] = False
    for fused in (False, True):
        model.set_kernels(SdpaBackend(), Fused(loss=fused))
        nll = model.nll(tokens[:, :-1], tokens[:, 1:], start_pos, excluded)
        results.append((nll, *torch.autograd.grad(nll.sin().sum(), tuple(model.parameters()))))
    assert results[1][0].shape == (2, 8 - start_pos)
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("excludes", [False, True])
def test_a_compiled_graph_holds_it(excludes: bool):
    torch.manual_seed(0)
    logits = torch.randn(9, 30, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 30, (9,))
    pairs = some_pairs(targets, 30) if excludes else ()

    def loss(x: Tensor) -> Tensor:
        return softcapped_nll(2 * x, targets, 15.0, *pairs)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(logits), logits)[0] for function in (compiled, loss)]
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not CAN_RUN, reason="the kernel needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "cap"), [(1024, 30.0), (8192, 30.0), (3001, 15.0), (50, 40.0)])
@pytest.mark.parametrize("excludes", [False, True])
def test_kernel_equals_torchs_loss_also_for_vocabulary_sizes_that_no_block_divides(dtype, vocab_size, cap, excludes):
    assert fused_loss.runs_on(cap, HERE, dtype)
    torch.manual_seed(0)
    logits = (12 * torch.randn(37, vocab_size, device=HERE)).to(dtype)
    logits[3] = -500.0  # all at the bottom of the cap
    logits[4, 7] = 60_000.0
    targets = torch.randint(0, vocab_size, (37,), device=HERE)
    grad = torch.randn(37, device=HERE)
    doubles = logits.double().requires_grad_()
    logits.requires_grad_()
    pairs = some_pairs(targets, vocab_size) if excludes else ()
    nll, expected = softcapped_nll(logits, targets, cap, *pairs)[0], torchs(doubles, targets, cap, *pairs)
    assert (nll - expected).abs().max() < 1e-4
    (result,) = torch.autograd.grad(nll, logits, grad)
    (exact,) = torch.autograd.grad(expected, doubles, grad.double())
    assert (result.double() - exact).norm() < 6e-3 * exact.norm()


@pytest.mark.usefixtures("formulas")  # which run with any type and cap
def test_only_16_bit_types_and_caps_up_to_40_are_fused():
    assert fused_loss.runs_on(40.0, CPU, torch.bfloat16)
    assert not fused_loss.runs_on(30.0, CPU, torch.float32)
    assert not fused_loss.runs_on(50.0, CPU, torch.bfloat16)
