"""Samples during training: a copy of the model writes, and neither the training nor its clock notices."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import TINY
from trainer.callbacks import samples as module
from trainer.clock import TrainingClock
from trainer.logging import logger
from trainer.model.transformer import Transformer


def test_a_sample_costs_no_training_time_and_changes_nothing(shard_folder: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    clock = TrainingClock(now=lambda: now[0])
    clock.start()
    now[0] = 5.0
    model = Transformer(TINY)
    data = SimpleNamespace(text=SimpleNamespace(tokenizer=shard_folder / "tokenizer.model"))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), datamodule=data, global_step=7)
    lightning_module = SimpleNamespace(model=model, device=torch.device("cpu"), clock=clock)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate, said = module.continue_text, []

    def slowly(*args: object):
        now[0] += 60.0
        return generate(*args)

    monkeypatch.setattr(module, "continue_text", slowly)
    monkeypatch.setattr(logger, "info", said.append)
    state = torch.get_rng_state()
    module.Samples(5, "the model").on_validation_end(trainer, lightning_module)
    assert len(said) == 1
    assert said[0].startswith("step      7  sample the model")
    assert clock.elapsed == 5.0
    now[0] += 1.0
    assert clock.elapsed == 6.0  # it runs again
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    module.Samples(None).on_validation_end(trainer, lightning_module)
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"samples\.tokens must be at least 1, or null"):
        module.Samples(0)
