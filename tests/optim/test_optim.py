"""Muon against its formula and torch's own, AdamW against torch's bit by bit, the schedule against a fake clock."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from trainer.clock import TrainingClock
from trainer.model.transformer import Transformer
from trainer.optim.muon_adamw import MuonAdamW, OptimizerConfig, parameter_groups
from trainer.optim.schedule import ScheduleConfig, lr_multiplier, muon_momentum, warmdown_warning

SHAPES = [(6, 4), (4, 6), (5, 5), (4, 6)]


def muon(shapes, dtype, **config) -> tuple[list[torch.Tensor], MuonAdamW]:
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    settings = OptimizerConfig(**config)
    groups = [
        {
            "params": [parameter for parameter in params if parameter.shape == shape],
            "lr": settings.matrix_lr,
            "weight_decay": settings.weight_decay,
            "muon": True,
        }
        for shape in dict.fromkeys(shapes)
    ]
    return params, MuonAdamW(groups, settings)


@pytest.mark.parametrize("row_normalize", [False, True])
def test_muon_equals_the_formula_in_float64_over_100_steps_of_changing_momentum(row_normalize: bool):
    params, optimizer = muon(SHAPES, torch.float64, weight_decay=0.07, row_normalize=row_normalize)
    settings = dict.fromkeys(SHAPES, (0.02, 0.07)) | {(5, 5): (0.05, 0.3)}  # rate and decay, of one group its own
    optimizer.param_groups[2].update(base_lr=0.05, weight_decay=0.3)
    weights = [p.detach().numpy().copy() for p in params]
    buffers = [np.zeros_like(w) for w in weights]
    rng = np.random.default_rng(0)
    for step in range(100):
        mu, multiplier = 0.92 + 0.0007 * step, 1 - step / 200
        optimizer.set_rates(multiplier, mu)
        for index, parameter in enumerate(params):
            g = rng.normal(size=parameter.shape)
            parameter.grad = torch.from_numpy(g)
            buffers[index] = mu * buffers[index] + g
            u = g + mu * buffers[index]
            if row_normalize:
                u = u / np.linalg.norm(u, axis=1, keepdims=True)
            x = u.T if u.shape[0] > u.shape[1] else u
            x = x / np.linalg.norm(x)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if u.shape[0] > u.shape[1] else x
            rows, cols = u.shape
            base_lr, decay = settings[rows, cols]
            lr = base_lr * multiplier
            weights[index] = weights[index] * (1 - lr * decay) - lr * max(1, rows / cols) ** 0.5 * x
        optimizer.step()
    for parameter, weight in zip(params, weights, strict=True):
        assert np.abs(parameter.detach().numpy() - weight).max() < 1e-6


def test_muon_equals_torch_muon_at_constant_momentum():
    params, optimizer = muon(SHAPES, torch.float32, weight_decay=0.1)
    twins = [p.detach().clone().requires_grad_() for p in params]
    theirs = torch.optim.Muon(twins, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original")
    optimizer.set_rates(1.0, 0.9)
    for _ in range(10):
        for parameter, twin in zip(params, twins, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        optimizer.step()
        theirs.step()
    for parameter, twin in zip(params, twins, strict=True):
        # Theirs computes in bfloat16: 10 steps of 0.02 with a relative error of about 1 %.
        assert (parameter - twin).norm() < 0.02 * (parameter - twin.detach() * 0).norm()
        assert torch.allclose(parameter, twin, atol=0.02)


@pytest.mark.parametrize("own", [{}, {"betas": (0.7, 0.99), "eps": 1e-3}])
def test_the_adamw_half_is_torch_adamw_bit_by_bit(own: dict[str, Any]):
    torch.manual_seed(1)
    params = [torch.randn(7, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
    twins = [p.detach().clone().requires_grad_() for p in params]
    config = OptimizerConfig(weight_decay=0.04)
    ours = MuonAdamW([{"params": params, "lr": 0.03, "weight_decay": 0.04, "muon": False, **own}], config)
    options = {"betas": (0.9, 0.95), "eps": 1e-8} | own
    theirs = torch.optim.AdamW(twins, lr=0.03, weight_decay=0.04, foreach=False, fused=False, **options)
    for step in range(20):
        multiplier = 1 - step / 40
        ours.set_rates(multiplier, 0.9)
        theirs.param_groups[0]["lr"] = 0.03 * multiplier
        for parameter, twin in zip(params, twins, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_every_parameter_is_in_one_group_and_muon_has_the_block_matrices_by_shape():
    model = Transformer(TINY)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values())
    assert [group["muon"] for group in groups] == [True] * 5 + [False] * 2
    shapes = [{parameter.shape for parameter in group["params"]} for group in groups if group["muon"]]
    assert shapes == [{(32, 16)}, {(32, 32)}, {(16, 32)}, {(96, 32)}, {(32, 96)}]
    matrices = {names[id(parameter)] for group in groups if group["muon"] for parameter in group["params"]}
    assert len(matrices) == 6 * 4 + 1
    assert all(name.startswith("blocks.") or name == "bigram.proj.weight" for name in matrices)
    embeddings = {names[id(parameter)] for parameter in groups[-2]["params"]}
    assert embeddings == {"token_embedding.weight", "bigram.table.weight"}
    assert {group["weight_decay"] for group in groups} == {0.5}  # the published Muon ignored its setting


def test_each_group_can_have_its_own_decay():
    config = OptimizerConfig(weight_decay=0.1, embedding_weight_decay=0.2, scalar_weight_decay=0.0)
    groups = parameter_groups(Transformer(TINY), config)
    assert [group["weight_decay"] for group in groups] == [0.1] * 5 + [0.2, 0.0]


def test_a_resumed_run_with_other_rates_uses_them():
    model = Transformer(TINY)

    def optimizer(**rates: float) -> MuonAdamW:
        config = OptimizerConfig(**rates)
        return MuonAdamW(parameter_groups(model, config), config)

    before, after = optimizer(), optimizer(matrix_lr=0.001, scalar_lr=0.002, weight_decay=0.5)
    before.set_rates(0.5, 0.9)
    after.load_state_dict(before.state_dict())
    after.set_rates(0.25, 0.9)
    assert [group["lr"] for group in after.param_groups] == [0.25 * rate for rate in [0.001] * 5 + [0.03, 0.002]]
    assert {group["weight_decay"] for group in after.param_groups} == {0.5}
    stored = before.state_dict()  # of a version whose groups had no betas
    for group in stored["param_groups"]:
        del group["betas"], group["eps"]
    after.load_state_dict(stored)
    assert {group["betas"] for group in after.param_groups} == {(0.9, 0.95)}


def test_an_untied_head_gets_adam_and_the_embeddings_another_rate():
    model = Transformer(replace(TINY, tied_embeddings=False))
    *matrices, embeddings, scalars, head = parameter_groups(model, OptimizerConfig())
    assert all(group["muon"] for group in matrices)
    assert embeddings["lr"] == 0.6
    assert scalars["lr"] == 0.02
    assert head["lr"] == 0.008
    assert head["weight_decay"] == 0
    assert head["params"][0] is model.head.weight
    assert not model.head.weight.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_clip_norm": 0.0}, r"optimizer\.grad_clip_norm must be positive, or null for none, not 0\.0"),
        ({"beta2": 1.0}, r"optimizer\.beta2 must be in \[0, 1\), not 1\.0"),
        ({"eps": 0.0}, r"optimizer\.eps must be positive, not 0\.0"),
        ({"matrix_lr": -0.02}, r"optimizer\.matrix_lr must be at least 0, not -0\.02"),
        ({"scalar_lr": float("nan")}, r"optimizer\.scalar_lr must be at least 0, not nan"),
        ({"embedding_weight_decay": -1.0}, r"optimizer\.embedding_weight_decay must be at least 0, not -1\.0"),
        ({"newton_schulz_steps": 0}, r"optimizer\.newton_schulz_steps must be at least 1, not 0"),
    ],
)
def test_bad_optimizer_settings_are_refused(options: dict[str, float], message: str):
    assert OptimizerConfig(grad_clip_norm=None).grad_clip_norm is None
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmdown_steps": -1}, r"schedule\.warmdown_steps and .* must be at least 0, not -1 and 1500"),
        ({"momentum_warmup_steps": -1}, r"momentum_warmup_steps must be at least 0, not 3000 and -1"),
        ({"momentum_warmup_steps": -7}, r"momentum_warmup_steps must be at least 0, not 3000 and -7"),
        ({"warmdown_frac": 1.5}, r"schedule\.warmdown_frac must be between 0 and 1, not 1\.5"),
        ({"warmdown_frac": -0.5}, r"schedule\.warmdown_frac must be between 0 and 1, not -0\.5"),
        ({"momentum_warmup_start": -0.5}, r"schedule\.momentum_warmup_start must be in \[0, 1\), not -0\.5"),
        ({"momentum_warmup_start": 1.5}, r"schedule\.momentum_warmup_start must be in \[0, 1\), not 1\.5"),
        ({"momentum_warmup_start": 1.0}, r"schedule\.momentum_warmup_start must be in \[0, 1\), not 1\.0"),
    ],
)
def test_bad_schedule_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)


def test_the_ends_of_the_ranges_are_settings():
    without_warmdown = ScheduleConfig(warmdown_steps=0, momentum_warmup_start=0.0, momentum_warmup_steps=0)
    assert lr_multiplier(without_warmdown, 9, 10, 0.0, None) == 1.0
    assert muon_momentum(without_warmdown, 0, 0.99) == 0.99
    assert lr_multiplier(ScheduleConfig(warmdown_frac=0.0), 9, 10, 0.0, None) == 1.0
    falling = ScheduleConfig(warmdown_frac=1.0, momentum_warmup_start=0.0, momentum_warmup_steps=10)
    assert [lr_multiplier(falling, step, 4, 0.0, None) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert muon_momentum(falling, 5, 0.8) == pytest.approx(0.4)


def test_warmdown_over_the_last_steps():
    schedule = ScheduleConfig(warmdown_steps=600)
    rates = [lr_multiplier(schedule, step, 1500, 0.0, None) for step in range(1500)]
    assert rates[:901] == [1.0] * 901
    assert rates[1200] == pytest.approx(0.5)
    assert rates[1499] == pytest.approx(1 / 600)


def test_the_smaller_of_step_and_clock_multiplier_counts():
    time = [0.0]
    clock = TrainingClock(100.0, now=lambda: time[0])
    clock.start()
    time[0] = 60.0
    schedule = ScheduleConfig(warmdown_steps=100)
    # 60 steps of 1 s: by the clock 40 s are left of a warmdown of 100 s; by the steps, 10 of 100.
    assert lr_multiplier(schedule, 60, None, clock.elapsed, clock.budget) == pytest.approx(0.4)
    assert lr_multiplier(schedule, 60, 70, clock.elapsed, clock.budget) == pytest.approx(0.1)
    assert lr_multiplier(schedule, 60, 1000, clock.elapsed, clock.budget) == pytest.approx(0.4)
    assert lr_multiplier(schedule, 0, None, 0.0, 100.0) == 1.0
    # The first step took 2.5 s: 100 of them are a warmdown of 250 s, of which 97.5 s are left.
    assert lr_multiplier(schedule, 1, None, 2.5, 100.0) == pytest.approx(0.39)
    assert lr_multiplier(schedule, 90, None, 101.0, 100.0) == 0.0


def test_warmdown_as_a_fraction_of_the_budget():
    schedule = ScheduleConfig(warmdown_frac=0.5)
    assert lr_multiplier(schedule, 7, None, 40.0, 100.0) == 1.0
    assert lr_multiplier(schedule, 7, None, 75.0, 100.0) == pytest.approx(0.5)
    assert lr_multiplier(schedule, 75, 100, 0.0, None) == pytest.approx(0.5)


@pytest.mark.parametrize("frac", [None, 0.5])
@pytest.mark.parametrize("warmdown", [0, 9, 10, 11, 3000])
def test_a_warmdown_longer_than_the_run_is_named(warmdown: int, frac: float | None):
    falls_at_once = lr_multiplier(ScheduleConfig(warmdown, frac), 0, 10, 0.0, None) < 1
    assert (warmdown_warning(warmdown, frac, 10) is not None) == falls_at_once


def test_the_warmdown_ends_at_zero():
    schedule = ScheduleConfig(warmdown_frac=0.5)
    assert lr_multiplier(schedule, 100, 100, 0.0, None) == 0.0
    assert lr_multiplier(schedule, 7, None, 100.0, 100.0) == 0.0


def test_momentum_rises_linearly():
    schedule = ScheduleConfig()
    assert muon_momentum(schedule, 0, 0.99) == pytest.approx(0.92)
    assert muon_momentum(schedule, 750, 0.99) == pytest.approx(0.955)
    assert muon_momentum(schedule, 5000, 0.99) == 0.99


def test_a_paused_clock_does_not_count_and_a_saved_one_resumes():
    time = [0.0]
    clock = TrainingClock(10.0, now=lambda: time[0])
    clock.start()
    time[0] = 4.0
    clock.pause()
    time[0] = 100.0
    assert clock.elapsed == 4.0
    other = TrainingClock(10.0, now=lambda: time[0])
    other.load_state_dict(clock.state_dict())
    other.start()
    time[0] = 106.0
    assert other.elapsed == 10.0


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_with_a_bad_gradient_changes_nothing_bit_by_bit(device: str):
    """Three ways to the same weights: nothing was checked, all was finite, and a bad step between two good ones."""

    def train(steps: list[bool | None]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model, config = Transformer(TINY).to(device), OptimizerConfig()
        optimizer = MuonAdamW(parameter_groups(model, config), config)
        torch.manual_seed(1)
        for finite in steps:
            for number, parameter in enumerate(model.parameters()):
                grad = torch.full_like(parameter, float("nan")) if finite is False else torch.randn_like(parameter)
                parameter.grad = torch.zeros_like(parameter) if finite is False and number % 3 else grad
            optimizer.finite = None if finite is None else torch.tensor(finite, device=device)
            optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values()]
        return [p.detach().clone() for p in model.parameters()], state

    weights, state = train([None, None])
    for steps in ([True, True], [True, False, True], [True, False, False, True, False]):
        other_weights, other_state = train(steps)
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True)), steps
        assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True)), steps
