"""Squared ReLU inside the matrix products, against the plain MLP and torch's own derivatives."""

import pytest
import torch
import torch.nn.functional as F

from trainer.kernels import fused_mlp
from trainer.kernels.fused_mlp import squared_relu_mlp
from trainer.model.mlp import MLP, MLPConfig

GPU = torch.device("cuda")


def plain_product(a, b, squared):
    """What the kernel computes, as formulas."""
    product = a @ b.mT
    return F.relu(product).square() if squared is None else product * 2 * squared.sqrt()


def test_operator_and_its_derivative_equal_torchs(monkeypatch):
    monkeypatch.setattr(fused_mlp, "_product", plain_product)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (6, 4), (4, 6))]
    assert torch.autograd.gradcheck(lambda *tensors: squared_relu_mlp(*tensors)[0], inputs)
    x, up, down = inputs
    expected = F.linear(F.relu(F.linear(x, up)).square(), down)
    torch.testing.assert_close(squared_relu_mlp(x, up, down)[0], expected, rtol=1e-12, atol=1e-12)


def test_fused_module_equals_the_plain_one_with_scale_and_all_gradients(monkeypatch):
    monkeypatch.setattr(fused_mlp, "_product", plain_product)
    torch.manual_seed(0)
    mlp = MLP(MLPConfig(ratio=3), 8).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(8, dtype=torch.float64, requires_grad=True)
    results = []
    for mlp.is_fused in (False, True):
        out = mlp(x, scale)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, scale, *mlp.parameters()))))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_equals_the_formula_also_for_sizes_that_no_tile_divides(dtype):
    if not fused_mlp.runs_on((72, 424), GPU, dtype):
        pytest.skip("the kernel needs a GPU with a tensor memory accelerator (Hopper or newer)")
    torch.manual_seed(0)
    a, b = torch.randn(1000, 72, device=GPU, dtype=dtype), torch.randn(424, 72, device=GPU, dtype=dtype)
    product = a.double() @ b.double().mT
    y = fused_mlp._product(a, b, None)
    gradient = fused_mlp._product(a, b, y)
    expected = F.relu(product).square()
    assert (y.double() - expected).norm() / expected.norm() < 3e-3
    assert abs((y.double() / expected)[expected > 1].mean() - 1) < 1e-4  # rounding has no preference
    expected = product * 2 * F.relu(product)
    assert (gradient.double() - expected).norm() / expected.norm() < 6e-3
