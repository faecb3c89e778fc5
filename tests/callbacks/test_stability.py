"""What the stability monitor logs about a series of losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from trainer.callbacks.stability import StabilityMonitor
from trainer.errors import UserError
from trainer.lightning_module import LanguageModel
from trainer.step import StepFence


@pytest.fixture
def module() -> LanguageModel:
    return LanguageModel(**{key: getattr(TINY, key) for key in ("vocab_size", "num_layers", "model_dim")})


def check(monitor: StabilityMonitor, module: LanguageModel, step: int, *values: float, precision: str = "32-true"):
    """Check the loss and the gradient norms of a step."""
    module.completed_metrics = [(step, torch.tensor(values, dtype=torch.float64))]
    monitor.on_train_batch_start(SimpleNamespace(precision=precision), module)


def test_a_loss_six_standard_deviations_above_the_steps_before_is_logged(module: LanguageModel, capsys):
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.1, 200)
    losses[100] = 9.0  # not enough steps before it
    before = losses[50 : 50 + 128]
    losses[178] = before.mean() + 6.01 * before.std(ddof=1)
    monitor = StabilityMonitor()
    for step, loss in enumerate(losses):
        check(monitor, module, step, loss, 1.0, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: step 178: the loss jumped to {losses[178]:.4f} ({before.mean():.4f} +- ")


def test_threshold_and_history_are_those_of_the_options(module: LanguageModel, capsys):
    monitor = StabilityMonitor(threshold_std=2.0, history_steps=3)
    for step, loss in enumerate((3.0, 3.1, 3.2, 3.29, 3.41)):  # mean and deviation before: 3.1 and 0.1; 3.197 and 0.095
        check(monitor, module, step, loss, 1.0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "warning: step 4: the loss jumped to 3.4100 (3.1967 +- 0.0950 before)"
    for options in ({"threshold_std": 0.0}, {"history_steps": 1}, {"max_skipped": 0}):
        with pytest.raises(ValueError, match=r"stability\."):
            StabilityMonitor(**options)


def test_a_resumed_run_knows_the_losses_and_the_skipped_updates_before(module: LanguageModel, capsys):
    before = StabilityMonitor("skip", max_skipped=2, threshold_std=2.0, history_steps=3)
    for step, (loss, norm) in enumerate(((3.0, 1.0), (3.1, float("inf")), (3.1, 1.0), (3.2, 1.0), (3.1, float("nan")))):
        check(before, module, step, loss, norm)
    module.fence = StepFence(torch.device("cpu"))
    monitor = StabilityMonitor("skip", max_skipped=2, threshold_std=2.0, history_steps=3)
    monitor.load_state_dict(before.state_dict())
    capsys.readouterr()
    check(monitor, module, 5, 3.5, 1.0)
    assert "the loss jumped to 3.5000 (3.1000 +- 0.1000 before)" in capsys.readouterr().out
    with pytest.raises(UserError, match="after 2 skipped ones"):
        check(monitor, module, 6, 3.1, float("inf"))


def test_a_loss_that_is_not_finite_on_one_process_only_stops_no_run(module: LanguageModel, capsys):
    monitor = StabilityMonitor(history_steps=2)
    for loss in (3.0, 3.1, float("inf"), 3.05, float("nan")):
        check(monitor, module, 1, loss, 1.0)
    assert capsys.readouterr().out == ""


def test_fp16_overflows_are_counted_only_in_a_row(module: LanguageModel):
    monitor = StabilityMonitor(max_skipped=3)
    for norm in (float("inf"), float("inf"), float("inf"), 1.0, float("inf"), float("nan"), float("inf")):
        check(monitor, module, 1, 2.0, norm, precision="16-mixed")
    with pytest.raises(UserError, match="after 3 skipped ones was not made"):
        check(monitor, module, 1, 2.0, float("inf"), precision="16-mixed")
