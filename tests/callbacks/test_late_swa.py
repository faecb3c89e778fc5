"""The average is the mean of the right snapshots, and the live weights stay as they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.lightning_module import LanguageModel


def test_the_average_is_numpys_mean_of_the_late_snapshots():
    torch.manual_seed(0)
    module = LanguageModel(**{key: getattr(TINY, key) for key in ("vocab_size", "num_layers", "model_dim")})
    swa = WeightAveraging(start_frac=0.4, every=3)
    taken: dict[str, list[np.ndarray]] = {name: [] for name in module.model.state_dict()}
    for step in range(1, 31):
        module.lr_multiplier = 1 - step / 30
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
        swa.on_train_batch_end(SimpleNamespace(global_step=step), module)
        for name, tensor in module.model.state_dict().items():
            assert torch.equal(tensor, before[name])
            if step % 3 == 0 and 1 - step / 30 < 0.4:
                taken[name].append(tensor.numpy().copy())
    assert swa.count == 4  # steps 21, 24, 27 and 30; at step 18 the multiplier is 0.4, not below it
    average = swa.averaged_state()
    assert average is not None
    for name, snapshots in taken.items():
        assert np.allclose(average[name].numpy(), np.mean(snapshots, axis=0), atol=1e-6), name


def test_half_precision_weights_are_summed_in_float32():
    module = LanguageModel(vocab_size=16, num_layers=2, model_dim=16).bfloat16()
    swa = WeightAveraging(start_frac=1.0, every=1)
    module.lr_multiplier = 0.0
    for step in range(1, 301):  # 300 times the same: a bfloat16 sum would stop growing at 256
        swa.on_train_batch_end(SimpleNamespace(global_step=step), module)
    average = swa.averaged_state()
    assert average is not None
    weight = module.model.token_embedding.weight
    assert average["token_embedding.weight"].dtype == torch.float32
    assert torch.allclose(average["token_embedding.weight"], weight.float(), rtol=1e-5)


def test_a_run_that_goes_on_without_averaging_has_no_old_average():
    module = LanguageModel(vocab_size=16, num_layers=2, model_dim=16)
    module.lr_multiplier = 0.0
    swa, off, on = WeightAveraging(every=1), WeightAveraging(start_frac=0), WeightAveraging()
    for step in (1, 2):
        swa.on_train_batch_end(SimpleNamespace(global_step=step), module)
    for after in (off, on):
        after.load_state_dict(swa.state_dict())
    assert off.averaged_state() is None
    assert on.averaged_state() is not None


def test_one_snapshot_is_no_average():
    module = LanguageModel(vocab_size=16, num_layers=2, model_dim=16)
    module.lr_multiplier = 0.0
    swa = WeightAveraging(every=1)
    swa.on_train_batch_end(SimpleNamespace(global_step=1), module)
    assert swa.averaged_state() is None
    with pytest.raises(ValueError, match="start_frac"):
        WeightAveraging(start_frac=1.5)
