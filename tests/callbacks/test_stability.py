"""What the watch says of a series of losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from trainer.callbacks import watch
from trainer.callbacks.stability import StabilityMonitor
from trainer.lightning_module import LanguageModel


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(watch, "rank_zero_info", lines.append)
    return lines


def test_a_loss_six_sigmas_above_the_steps_before_is_said(said: list[str]):
    module = LanguageModel(**{key: getattr(TINY, key) for key in ("vocab_size", "num_layers", "model_dim")})
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.1, 200)
    losses[100] = 9.0  # not enough steps before it
    before = losses[50 : 50 + 128]
    losses[178] = before.mean() + 6.01 * before.std(ddof=1)
    looking = StabilityMonitor()
    trainer = SimpleNamespace(precision="32-true")
    for step, loss in enumerate(losses):
        module.finished = [(step, torch.tensor([loss, 1.0, 1.0], dtype=torch.float64))]
        looking.on_train_batch_start(trainer, module)  # type: ignore[arg-type]
    assert len(said) == 1
    assert said[0].startswith(f"step 178: the loss jumps to {losses[178]:.4f} ({before.mean():.4f} +- ")


def test_a_loss_that_only_this_rank_sees_stops_nobody(said: list[str]):
    module = LanguageModel(**{key: getattr(TINY, key) for key in ("vocab_size", "num_layers", "model_dim")})
    looking = StabilityMonitor(history_steps=2)
    for loss in (3.0, 3.1, float("inf"), 3.05, float("nan")):
        module.finished = [(1, torch.tensor([loss, 1.0]))]
        looking.on_train_batch_start(SimpleNamespace(precision="32-true"), module)  # type: ignore[arg-type]
    assert said == []


def test_fp16_overflows_are_counted_only_in_a_row():
    module = LanguageModel(**{key: getattr(TINY, key) for key in ("vocab_size", "num_layers", "model_dim")})
    looking = StabilityMonitor(max_skipped=3)
    trainer = SimpleNamespace(precision="16-mixed")

    def look(norm: float) -> None:
        module.finished = [(1, torch.tensor([2.0, norm]))]
        looking.on_train_batch_start(trainer, module)  # type: ignore[arg-type]

    for norm in (float("inf"), float("inf"), float("inf"), 1.0, float("inf"), float("nan"), float("inf")):
        look(norm)
    with pytest.raises(watch.UserError, match="after 3 skipped ones was not made"):
        look(float("inf"))
