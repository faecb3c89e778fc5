"""Late SWA is the mean of the right snapshots, the EMA follows its formula, and the live weights are never touched."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.checkpoint import stored_average
from trainer.lightning_module import LanguageModel


@pytest.fixture
def module() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=16, num_layers=2, model_dim=16)


def train(averaging: WeightAveraging, module: LanguageModel, steps: range) -> list[np.ndarray]:
    """Change the weights at random after every step; returns one matrix of each step."""
    matrices = []
    for step in steps:
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaging.on_train_batch_end(SimpleNamespace(global_step=step, max_steps=-1), module)
        matrices.append(module.model.token_embedding.weight.detach().numpy().copy())
    return matrices


def resumed(averaging: WeightAveraging, **options: object) -> WeightAveraging:
    other = WeightAveraging(**options)
    other.load_state_dict(averaging.state_dict())
    return other


def test_late_swa_is_numpys_mean_of_the_late_snapshots():
    torch.manual_seed(0)
    module = LanguageModel(**{key: getattr(TINY, key) for key in ("vocab_size", "num_layers", "model_dim")})
    averaging = WeightAveraging(start_frac=0.4, every=3)
    snapshots: dict[str, list[np.ndarray]] = {name: [] for name in module.model.state_dict()}
    for step in range(1, 31):
        module.lr_multiplier = 1 - step / 30
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
        averaging.on_train_batch_end(SimpleNamespace(global_step=step, max_steps=-1), module)
        for name, tensor in module.model.state_dict().items():
            assert torch.equal(tensor, before[name])
            if step % 3 == 0 and 1 - step / 30 < 0.4:
                snapshots[name].append(tensor.numpy().copy())
    assert averaging.count == 4  # steps 21, 24, 27 and 30; at step 18 the multiplier is 0.4, not below it
    average = averaging.averaged_state()
    assert average is not None
    for name, tensors in snapshots.items():
        assert np.allclose(average[name].numpy(), np.mean(tensors, axis=0), atol=1e-6), name


def test_late_swa_resumes(module: LanguageModel):
    module.lr_multiplier = 0.1
    averaging = WeightAveraging(every=2)
    matrices = train(averaging, module, range(1, 8))
    averaging = resumed(averaging, every=2)
    matrices += train(averaging, module, range(8, 13))
    stored = stored_average({"callbacks": {"WeightAveraging": averaging.state_dict()}})
    assert stored is not None
    assert np.allclose(stored["token_embedding.weight"].numpy(), np.mean(matrices[1::2], axis=0), atol=1e-6)


def test_the_ema_weighs_every_step_by_its_formula_and_resumes(module: LanguageModel):
    averaging = WeightAveraging("ema", horizon=0.1)
    matrices = train(averaging, module, range(1, 21))
    averaging = resumed(averaging, method="ema", horizon=0.1)
    matrices += train(averaging, module, range(21, 41))
    weights = np.zeros(40)
    weights[0] = 1
    for step in range(2, 41):
        share = 1 / (1 + 0.1 * step)
        weights[: step - 1] *= 1 - share
        weights[step - 1] = share
    expected = np.tensordot(weights, np.stack(matrices), 1)
    average = averaging.averaged_state()
    assert average is not None
    assert np.allclose(average["token_embedding.weight"].numpy(), expected, atol=1e-5)
    stored = stored_average({"callbacks": {"WeightAveraging": averaging.state_dict()}})
    assert stored is not None
    assert torch.equal(stored["token_embedding.weight"], average["token_embedding.weight"])
    assert weights @ np.arange(39, -1, -1) == pytest.approx(4, abs=0.7)  # it covers about a tenth of the run
    assert np.array_equal(module.model.token_embedding.weight.detach().numpy(), matrices[-1])


@pytest.mark.parametrize("method", ["late_swa", "ema"])
def test_half_precision_weights_are_averaged_in_float32(module: LanguageModel, method: str):
    module = module.bfloat16()
    averaging = WeightAveraging(method, start_frac=1.0, every=1)
    module.lr_multiplier = 0.0
    for step in range(1, 301):  # 300 times the same: a bfloat16 sum would stop growing at 256
        averaging.on_train_batch_end(SimpleNamespace(global_step=step, max_steps=-1), module)
    average = averaging.averaged_state()
    assert average is not None
    weight = module.model.token_embedding.weight
    assert average["token_embedding.weight"].dtype == torch.float32
    assert torch.allclose(average["token_embedding.weight"], weight.float(), rtol=1e-5)


@pytest.mark.parametrize("method", ["late_swa", "ema"])
def test_a_run_that_resumes_without_its_average_or_with_another_one_drops_the_old_one(
    module: LanguageModel, method: str
):
    module.lr_multiplier = 0.0
    averaging = WeightAveraging(method, every=1)
    train(averaging, module, range(1, 3))
    assert averaging.state_dict().keys() == {"method", "weights", "count", "budget"}
    assert resumed(averaging, method=method).averaged_state() is not None
    other = "ema" if method == "late_swa" else "late_swa"
    for dropped in (resumed(averaging, method=None), resumed(averaging, method=other)):
        assert dropped.averaged_state() is None
        assert dropped.state_dict() == {"method": dropped.method, "weights": {}, "count": 0, "budget": None}


def test_snapshots_are_forgotten_when_the_rate_is_high_again_or_the_budget_is_another(module: LanguageModel):
    averaging = WeightAveraging(start_frac=0.4, every=1)

    def count(step: int, multiplier: float, max_steps: int = -1) -> int:
        module.lr_multiplier = multiplier
        averaging.on_train_batch_end(SimpleNamespace(global_step=step, max_steps=max_steps), module)
        return averaging.count

    assert [count(1, 0.39), count(2, 0.2), count(3, 0.3), count(4, 0.399)] == [1, 2, 3, 4]  # small rises do not matter
    assert [count(5, 0.4), count(6, 0.39), count(6, 0.9), count(6, 0.39)] == [0, 1, 0, 1]
    assert [count(7, 0.3), count(8, 0.3, max_steps=100), count(9, 0.3, max_steps=100)] == [2, 1, 2]
    module.clock.budget = 60.0
    assert count(10, 0.3, max_steps=100) == 1


@pytest.mark.parametrize("method", ["late_swa", "ema"])
def test_one_snapshot_or_step_is_not_an_average(module: LanguageModel, method: str):
    module.lr_multiplier = 0.0
    averaging = WeightAveraging(method, every=1)
    train(averaging, module, range(1, 2))
    assert averaging.averaged_state() is None
    train(averaging, module, range(2, 3))
    assert averaging.averaged_state() is not None


def test_without_a_method_nothing_is_averaged(module: LanguageModel):
    module.lr_multiplier = 0.0
    averaging = WeightAveraging(None, start_frac=1.0, every=1)
    train(averaging, module, range(1, 4))
    assert averaging.averaged_state() is None
    assert not averaging.weights


def test_the_ends_of_the_ranges_are_settings():
    averaging = WeightAveraging("ema", start_frac=1.0, every=1, horizon=1.0)
    assert (averaging.start_frac, averaging.every, averaging.horizon) == (1.0, 1, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_frac": -0.5}, r"averaging\.start_frac -0\.5 must be in \(0, 1\]"),
        ({"horizon": -0.5}, r"averaging\.horizon must be in \(0, 1\], not -0\.5"),
        ({"start_frac": 0.0}, r"averaging\.start_frac 0\.0 must be in \(0, 1\]"),
        ({"start_frac": 1.5}, r"averaging\.start_frac 1\.5 must be in \(0, 1\]"),
        ({"every": 0}, r"averaging\.every 0 be at least 1"),
        ({"horizon": 0.0}, r"averaging\.horizon must be in \(0, 1\], not 0\.0"),
        ({"horizon": 1.5}, r"averaging\.horizon must be in \(0, 1\], not 1\.5"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WeightAveraging(**options)
