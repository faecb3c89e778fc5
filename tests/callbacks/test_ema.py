"""The moving average is the weighted mean that its formula says, at any length of run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.callbacks.weight_averaging import EMA
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.checkpoint import stored_average
from trainer.errors import UserError
from trainer.lightning_module import LanguageModel


def run(ema: EMA, module: LanguageModel, steps: range) -> list[np.ndarray]:
    """Change the weights at random after every step; returns one matrix of each step."""
    taken = []
    for step in steps:
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.on_train_batch_end(SimpleNamespace(global_step=step), module)
        taken.append(module.model.token_embedding.weight.detach().numpy().copy())
    return taken


def test_the_average_weighs_every_step_as_the_formula_says_and_goes_on_after_a_restart():
    torch.manual_seed(0)
    module, ema = LanguageModel(vocab_size=16, num_layers=2, model_dim=16), EMA(horizon=0.1)
    taken = run(ema, module, range(1, 21))
    restarted = EMA(horizon=0.1)
    restarted.load_state_dict(ema.state_dict())
    taken += run(restarted, module, range(21, 41))
    weights = np.zeros(40)
    weights[0] = 1
    for step in range(2, 41):
        share = 1 / (1 + 0.1 * step)
        weights[: step - 1] *= 1 - share
        weights[step - 1] = share
    expected = np.tensordot(weights, np.stack(taken), 1)
    mean = restarted.averaged_state()
    assert mean is not None
    assert np.allclose(mean["token_embedding.weight"].numpy(), expected, atol=1e-5)
    stored = stored_average({"callbacks": {"EMA": restarted.state_dict()}})
    assert stored is not None
    assert torch.equal(stored["token_embedding.weight"], mean["token_embedding.weight"])
    assert weights @ np.arange(39, -1, -1) == pytest.approx(4, abs=0.7)  # it looks back over a tenth of the run


def test_it_is_off_by_default_and_refuses_a_second_average():
    module, ema = LanguageModel(vocab_size=16, num_layers=2, model_dim=16), EMA()
    run(ema, module, range(1, 4))
    assert ema.averaged_state() is None
    on = EMA(horizon=0.1)
    run(on, module, range(1, 4))
    ema.load_state_dict(on.state_dict())  # a run that goes on without it has no old average
    assert ema.averaged_state() is None
    trainer = SimpleNamespace(callbacks=[WeightAveraging(), EMA(0.1)])
    with pytest.raises(UserError, match=r"ema\.horizon and late_swa\.start_frac"):
        trainer.callbacks[1].setup(trainer, module, "fit")
    with pytest.raises(ValueError, match="horizon"):
        EMA(1.5)
