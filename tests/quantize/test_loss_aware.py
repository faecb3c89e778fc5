"""Moments against autograd, feedback against the formula of optimal brain surgery, steps against theirs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TINY
from trainer.errors import UserError
from trainer.kernels.attention_backends import SdpaBackend
from trainer.model.config import TransformerConfig
from trainer.model.transformer import Transformer
from trainer.quantize.calibration import EMBEDDING, Moments, calibrate
from trainer.quantize.container import EXPONENTS_PER_OCTAVE
from trainer.quantize.export import CAP_TOLERANCE, ExportedSize, find_quant_step
from trainer.quantize.gptq import DAMPING, inverse_factor, round_with_feedback
from trainer.quantize.loss_aware import MIN_RELATIVE, ROW_EXPONENT, LossAwareRounding
from trainer.quantize.policy import QuantizationConfig


def randomized(config: TransformerConfig = TINY) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return randomized()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def moments(model: Transformer, tokens: torch.Tensor) -> dict[str, Moments]:
    return calibrate(model, tokens.split(3))


def test_moments_are_those_of_the_products_inputs_and_of_the_gradients_at_their_outputs(
    model: Transformer, tokens: torch.Tensor, moments: dict[str, Moments]
):
    """An offset is added to the product W x of each position; its gradient by autograd is the gradient there."""
    for name in ("blocks.1.attention.q", "blocks.0.attention.out", "blocks.2.mlp.up", "blocks.3.mlp.down"):
        matrix = model.get_submodule(name)
        seen = {}

        def offset(module, inputs, output, seen=seen):
            x, *scale = inputs
            seen["x"] = x.detach().reshape(-1, x.size(-1)).double().numpy()
            seen["offset"] = torch.zeros(output.shape, requires_grad=True)
            return output + (scale[0] if scale else 1) * seen["offset"]

        handle = matrix.register_forward_hook(offset)
        for block in model.blocks:
            block.attention.has_hooks = True
        model.nll(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        handle.remove()
        for block in model.blocks:
            block.attention.has_hooks = False
        model.zero_grad()
        result, positions = moments[f"{name}.weight"], 4 * 16
        assert np.allclose(result.hessian.numpy(), seen["x"].T @ seen["x"] / positions, atol=1e-5)
        gradient = seen["offset"].grad.reshape(positions, -1).double().numpy()
        assert np.allclose(result.sensitivity.numpy(), (gradient**2).mean(0), rtol=1e-3, atol=1e-12)


def test_moments_of_the_tied_embedding_are_those_of_the_head_and_of_the_lookups(
    model: Transformer, tokens: torch.Tensor, moments: dict[str, Moments]
):
    with torch.no_grad():
        hidden = model.hidden(tokens[:, :-1]).reshape(-1, 32).double().numpy()
        logits = model(tokens[:, :-1]).reshape(-1, 300).double().numpy()
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    probability[np.arange(64), tokens[:, 1:].reshape(-1)] -= 1
    at_logits = probability * (1 - (logits / 30) ** 2)  # through the softcap
    head = (at_logits**2).mean(0)
    result = moments[EMBEDDING]
    second = hidden.T @ hidden / 64
    lookups = result.hessian.numpy() - second * head.mean()
    level = np.diag(lookups).mean()
    assert level > 0
    assert np.allclose(lookups, level * np.eye(32), atol=1e-3 * level + 1e-6)
    unused = np.setdiff1d(np.arange(300), tokens[:, :-1].unique().numpy())
    cost = result.sensitivity.numpy() * np.diag(result.hessian.numpy()).mean()
    assert np.allclose(cost[unused], head[unused] * np.diag(second).mean(), rtol=1e-3)
    used = tokens[:, :-1].unique().numpy()
    assert (cost[used] > head[used] * np.diag(second).mean()).all()


def test_moments_of_a_table_that_is_only_looked_up_are_those_of_its_rows_gradients(tokens: torch.Tensor):
    """Each position's copy of its row is a leaf, whose gradient by autograd is the gradient there."""
    model = randomized(replace(TINY, value_embedding_blocks=2))
    result = calibrate(model, [tokens])["value_embedding.weight"]
    ids = tokens[:, :-1]
    rows = model.value_embedding.weight.detach()[ids].requires_grad_()
    model.value_embedding.forward = lambda _: rows
    model.nll(ids, tokens[:, 1:]).sum().backward()
    expected = np.zeros(300)
    np.add.at(expected, ids.flatten().numpy(), (rows.grad.double() ** 2).mean(-1).flatten().numpy())
    assert np.allclose(result.sensitivity.numpy(), expected / ids.numel(), rtol=1e-3, atol=1e-12)
    assert torch.equal(result.hessian, torch.eye(16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_squares_may_exceed_the_range_and_the_digits_of_half_precision(
    dtype: torch.dtype, tokens: torch.Tensor
):
    model = randomized()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.up.weight.mul_(4)  # a square of 16 times the size, as after a long training
    expected = calibrate(model, [tokens])
    with torch.autocast("cpu", dtype):
        moments = calibrate(model, [tokens])
    positions = tokens[:, :-1].numel()
    assert max(float(each.hessian.max()) for each in expected.values()) * positions > torch.finfo(torch.float16).max
    for name, each in moments.items():
        for actual, wanted in ((each.hessian, expected[name].hessian), (each.sensitivity, expected[name].sensitivity)):
            assert torch.linalg.vector_norm(actual - wanted) < 0.1 * torch.linalg.vector_norm(wanted), name
        eigenvalues = np.linalg.eigvalsh(each.hessian.double().numpy())
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1], name  # none is negative but by the digits of float32
    LossAwareRounding(model.state_dict(), moments)


def rounding_of(hessian: torch.Tensor, weight: torch.Tensor) -> LossAwareRounding:
    return LossAwareRounding({"a.weight": weight}, {"a.weight": Moments(hessian, torch.ones(len(weight)))})


def test_inputs_that_are_always_zero_leave_their_matrix_to_plain_rounding():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    stored = rounding_of(torch.zeros(8, 8), weight).round(0.1)["a.weight"]
    steps = stored.scale.astype(np.float32)[:, None]
    assert np.array_equal(stored.values, np.round(weight.numpy() / steps))
    assert np.abs(stored.floats() - weight.numpy()).max() <= 0.5 * steps.max()


def test_moments_and_weights_that_no_artifact_can_hold_are_named():
    with pytest.raises(UserError, match="the inputs of a.weight cannot be weighed in calibration"):
        rounding_of(-torch.eye(4), torch.ones(2, 4))
    with pytest.raises(UserError, match=r"weights of a.weight are up to 1e\+08, more than an artifact can hold"):
        rounding_of(torch.eye(4), torch.full((2, 4), 1e8)).round(0.1)


def test_calibration_does_not_change_the_model_and_includes_an_untied_head(tokens: torch.Tensor):
    model = randomized(replace(TINY, tied_embeddings=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.nll(tokens[:, :-1], tokens[:, 1:])
    moments = calibrate(model, [tokens])
    assert torch.equal(model.nll(tokens[:, :-1], tokens[:, 1:]), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert not model.blocks[0].attention.has_hooks
    assert isinstance(model.blocks[0].attention.backend, SdpaBackend)
    assert {"head.weight", EMBEDDING, "bigram.proj.weight"} < set(moments)
    assert torch.equal(moments[EMBEDDING].hessian, torch.eye(32))


def surgery(weight: np.ndarray, step: np.ndarray, hessian: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Optimal brain surgery as first written: after each column, correct the others and shrink the inverse Hessian."""
    weight = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian)))
    symbols = np.zeros_like(weight)
    left = list(order)
    for column in order:
        symbols[:, column] = np.clip(np.round(weight[:, column] / step[:, column]), -127, 127)
        error = (weight[:, column] - symbols[:, column] * step[:, column]) / inverse[column, column]
        left.remove(column)
        weight[:, left] -= error[:, None] * inverse[column, left]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return symbols


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 150), st.integers(1, 4), st.integers(0, 2**31))
def test_feedback_equals_optimal_brain_surgery_and_beats_rounding(columns: int, rows: int, seed: int):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2 * columns, columns)) @ rng.normal(size=(columns, columns))
    hessian, weight = inputs.T @ inputs / len(inputs), rng.normal(size=(2, rows, columns))
    step = np.broadcast_to(rng.uniform(0.2, 0.8, (rows, 1)) * rng.uniform(0.5, 2, (1, columns)), (rows, columns))
    order, factor = inverse_factor(torch.tensor(hessian).expand(2, -1, -1))
    assert order[0].tolist() == np.argsort(-np.diag(hessian), kind="stable").tolist()
    result = round_with_feedback(torch.tensor(weight), torch.tensor(step.copy()).float(), 127, order, factor.float())
    lost = {"feedback": 0.0, "nearest": 0.0}
    for index in range(2):
        expected = surgery(weight[index], step.astype(np.float32).astype(float), hessian, order[index].numpy())
        # A tie or a last digit can send a symbol the other way, and what follows with it.
        assert (result[index].numpy() == expected).mean() > 0.9
        for name, symbols in (("feedback", result[index].numpy()), ("nearest", np.round(weight[index] / step))):
            error = symbols * step - weight[index]
            lost[name] += np.einsum("rc,cd,rd->", error, hessian, error)
    assert lost["feedback"] <= 1.2 * lost["nearest"]


def test_steps_follow_the_formula_and_halving_them_costs_a_bit_per_weight(
    model: Transformer, moments: dict[str, Moments]
):
    state = model.state_dict()
    rounding = LossAwareRounding(state, moments)
    coarse, fine = rounding.round(0.001), rounding.round(0.0005)
    assert set(coarse) == set(moments)
    for name, tensor in coarse.items():
        hessian, sensitivity = moments[name].hessian.double().numpy(), moments[name].sensitivity.double().numpy()
        order = np.argsort(-np.diag(hessian), kind="stable")
        damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
        cost = np.empty(len(hessian))  # of a column's error, after the later columns have compensated for it
        for index, column in enumerate(order):
            later = order[index:]
            cost[column] = 1 / np.linalg.inv(damped[np.ix_(later, later)])[0, 0]
        mean = sensitivity.mean()
        rows = mean * np.maximum(sensitivity / mean, MIN_RELATIVE) ** ROW_EXPONENT
        step = tensor.scale.astype(float)[:, None] * 2 ** (tensor.columns / EXPONENTS_PER_OCTAVE)
        constant = step * np.sqrt(rows[:, None] * cost)
        free = np.abs(tensor.values).max(1) < 120  # in the other rows the range of symbols demanded larger steps
        if free.any():
            assert np.allclose(np.log2(constant[free] / 0.001), 0, atol=0.5 / EXPONENTS_PER_OCTAVE + 0.01), name
        assert np.abs(tensor.values).max() <= 127
    wide = [name for name in coarse if np.abs(fine[name].values).max() < 120 and np.abs(coarse[name].values).mean() > 2]
    assert wide
    for name in wide:
        ratio = np.abs(fine[name].values).mean() / np.abs(coarse[name].values).mean()
        assert ratio == pytest.approx(2, rel=0.1)
    error = [np.square(tensors[EMBEDDING].floats() - state[EMBEDDING].numpy()).mean() for tensors in (coarse, fine)]
    assert error[1] < 0.5 * error[0]


@pytest.mark.parametrize("cap", [16_000_000, 12_345_678, 3_000_000])
@pytest.mark.parametrize("bend", [0.0, 0.4])
def test_the_search_lands_just_under_the_cap(cap: int, bend: float, capsys):
    """Sizes that fall with the step's logarithm, and that flatten out as they do with an entropy coder."""
    calls = []

    def write(choice: QuantizationConfig) -> ExportedSize:
        bits = -np.log2(choice.quant_step) - 8
        bits = np.logaddexp(0, bits) if bend else max(bits, 0.1)
        calls.append(choice.quant_step)
        return ExportedSize(int(30e6 * (1 + bend) * bits / 8) + 50_000, 130_000, choice)

    size = find_quant_step(write, QuantizationConfig(rounding="loss_aware"), cap, 30_000_000)
    assert cap - CAP_TOLERANCE <= size.total <= cap
    assert calls[-1] == size.quantization.quant_step
    assert len(calls) <= 8
    assert capsys.readouterr().out.count("quant_step ") == len(calls)


def test_the_search_ends_at_the_finest_step_and_refuses_a_cap_that_no_step_meets():
    def write(choice: QuantizationConfig) -> ExportedSize:
        return ExportedSize(int(-1000 * np.log2(choice.quant_step)), 100_000, choice)

    finest = find_quant_step(write, QuantizationConfig(), 16_000_000, 1000)
    assert finest.quantization.quant_step == pytest.approx(2e-5)
    with pytest.raises(UserError, match="over the cap even with"):
        find_quant_step(write, QuantizationConfig(), 90_000, 1000)
