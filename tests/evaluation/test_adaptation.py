"""Test-time training never trains on a target before it is scored, and it lowers the loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from trainer.data.tokenizer import ByteTable, load_tokenizer
from trainer.errors import UserError
from trainer.evaluation import adaptation
from trainer.evaluation.adaptation import Adapter
from trainer.evaluation.metric import BitsPerByte
from trainer.evaluation.sliding import WindowScorer
from trainer.evaluation.windows import EvaluationConfig, batch_plan, plan_windows
from trainer.lightning_module import LanguageModel
from trainer.model.transformer import Transformer


def losses(
    tokens: torch.Tensor, rate: float, shard_folder, ema_decay: float | None = None
) -> tuple[torch.Tensor, list[int]]:
    """The loss of every target in the order of the text, and how many were scored before each step."""
    torch.manual_seed(0)
    model = Transformer(TINY)
    table = ByteTable.from_tokenizer(load_tokenizer(shard_folder / "tokenizer.model"))
    plan = plan_windows(len(tokens) - 1, 32, 8)
    scorer = WindowScorer(tokens, table, 32)
    adapter = Adapter(model.parameters(), model.nll, rate, 16, 1, ema_decay)
    scores, steps = torch.full((len(tokens) - 1,), float("nan")), []

    def nll(inputs: torch.Tensor, targets: torch.Tensor, start_pos: int, excluded: None) -> torch.Tensor:
        values = model.nll(inputs, targets, start_pos)
        for row, (start, scored_from) in enumerate(zip(batch.starts, batch.scored_from, strict=True)):
            if scored_from < 32:
                scores[start + scored_from : start + 32] = values[row, scored_from - start_pos :]
        return values

    for batch in batch_plan(plan, 2):
        scorer.add(BitsPerByte(), nll, batch)
        segment = scorer.scored(batch)
        begin = sum(steps)
        assert torch.equal(segment, tokens[begin : begin + len(segment)])
        steps.append(len(segment) - 1)
        adapter.learn(segment)
    return scores, steps


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_every_target_is_scored_once_and_trained_on_only_afterward(ema_decay: float | None, shard_folder):
    tokens = torch.randint(4, 300, (150,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    plain, steps = losses(tokens, 0.0, shard_folder)
    adapted, _ = losses(tokens, 0.1, shard_folder, ema_decay)
    assert sum(steps) == 149
    assert not adapted.isnan().any()
    assert torch.equal(adapted[: steps[0]], plain[: steps[0]])  # the first batch meets the model as it was
    assert (adapted[steps[0] :] != plain[steps[0] :]).all()


@pytest.mark.parametrize("micro_batch_tokens", [1, 8, 8192])
@pytest.mark.parametrize(
    ("count", "starts"), [(18, [4, 8, 12]), (12, [0, 4, 8]), (11, [0, 4]), (5, [0]), (23, [0, 4, 8, 12, 16])]
)
def test_a_step_is_sgd_on_the_mean_loss_of_whole_sequences(
    count: int, starts: list[int], micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """A target's loss is 7 times a weight that is chosen by input and target, so the gradient counts such pairs."""
    monkeypatch.setattr(adaptation, "MICRO_BATCH_TOKENS", micro_batch_tokens)
    rng = np.random.default_rng(3)
    weights = torch.zeros(50, requires_grad=True)
    adapter = Adapter([weights], lambda x, y, start: 7.0 * weights[x + y], rate=0.25, length=4, sequences=len(starts))
    adapter.learn(torch.arange(4 * len(starts)))  # a target too few
    assert adapter.steps == 0
    expected = np.zeros(50)
    for segment in rng.integers(0, 25, (3, count + 1)):
        adapter.learn(torch.from_numpy(segment))
        gradient = np.zeros(50)
        for start in starts:
            for at in range(start, start + 4):
                gradient[segment[at] + segment[at + 1]] += 7.0 / (4 * len(starts))
        gradient *= min(1.0, 1.0 / np.linalg.norm(gradient))  # at least 7 / sqrt(12) before
        expected -= 0.25 * gradient
        assert np.allclose(weights.detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_between_steps_the_weights_are_the_average_of_the_trained_ones(decay: float):
    """Each step moves the one weight that is read by its rate, since the clipped gradient has norm one."""
    weights = torch.zeros(50, requires_grad=True)
    adapter = Adapter([weights], lambda x, y, start: 7.0 * weights[x + y], 0.25, 4, 1, ema_decay=decay)
    trained, average = np.zeros(50), np.zeros(50)
    for read in (3, 3, 8, 20):
        adapter.learn(torch.full((5,), read))
        trained[2 * read] -= 0.25
        average = decay * average + (1 - decay) * trained
        assert np.allclose(weights.detach().numpy(), average, atol=1e-6)


def test_float16_is_refused(monkeypatch):
    """Gradients of a mean over thousands of targets are smaller than its smallest number."""
    config = EvaluationConfig(adapt_rate=0.1)
    for precision in ("32-true", "16-mixed"):
        trainer = SimpleNamespace(world_size=1, precision=precision, datamodule=SimpleNamespace(evaluation=config))
        monkeypatch.setattr(LanguageModel, "trainer", trainer)
        module = LanguageModel(vocab_size=16, num_layers=2, model_dim=16)
        module.nll = module.model.nll
        if precision == "16-mixed":
            with pytest.raises(UserError, match="underflow in float16"):
                module._adapter()
        else:
            assert module._adapter() is not None


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_no_score_depends_on_a_later_token(ema_decay: float | None, shard_folder):
    tokens = torch.randint(4, 300, (150,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    before, _ = losses(tokens, 0.1, shard_folder, ema_decay)
    for position in (60, 100, 149):
        changed = tokens.clone()
        changed[position] = 3 + changed[position] % 290
        after, _ = losses(changed, 0.1, shard_folder, ema_decay)
        assert torch.equal(after[: position - 1], before[: position - 1])  # target i is token i + 1
        assert not torch.equal(after[position - 1 :], before[position - 1 :])


def test_it_lowers_the_loss_of_a_text_that_repeats_itself(shard_folder):
    segment = torch.randint(4, 300, (25,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    tokens = segment.repeat(30)
    plain, _ = losses(tokens, 0.0, shard_folder)
    adapted, _ = losses(tokens, 0.1, shard_folder)
    assert adapted[-100:].mean() < plain[-100:].mean() - 0.5


@pytest.mark.parametrize(
    ("window", "stride", "attention_window", "batch_windows"),
    [(64, 48, 16, 1), (64, 40, 16, 1), (64, 48, 16, 3), (32, 8, None, 1), (32, 8, None, 8), (32, None, None, 3)],
)
def test_steps_have_tensors_of_one_shape_and_none_comes_after_the_last_score(
    window: int,
    stride: int | None,
    attention_window: int | None,
    batch_windows: int,
    shard_folder,
    monkeypatch: pytest.MonkeyPatch,
):
    """Each shape is compiled, which takes longer than a hundred steps."""
    monkeypatch.setattr(adaptation, "MICRO_BATCH_TOKENS", 64)
    config = EvaluationConfig(window, stride, batch_windows, attention_window=attention_window, adapt_rate=0.1)
    trainer = SimpleNamespace(world_size=1, precision="32-true", datamodule=SimpleNamespace(evaluation=config))
    monkeypatch.setattr(LanguageModel, "trainer", trainer)
    module = LanguageModel(vocab_size=300, num_layers=2, model_dim=16)
    shapes = []

    def nll(inputs: torch.Tensor, targets: torch.Tensor, start_pos: int, excluded: None = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            shapes.append(inputs.shape)
        return module.model.nll(inputs, targets, start_pos)

    module.nll = nll
    module.adapter = module._adapter()
    tokens = torch.randint(4, 300, (900,), dtype=torch.int32)
    table = ByteTable.from_tokenizer(load_tokenizer(shard_folder / "tokenizer.model"))
    plan = plan_windows(len(tokens) - 1, window, stride)
    batches = batch_plan(plan, batch_windows)
    trainer.num_val_batches = [len(batches)]
    module.scorers, module.metrics = [WindowScorer(tokens, table, plan.window)], torch.nn.ModuleList([BitsPerByte()])
    for index, batch in enumerate(batches):
        module.validation_step(batch, index)
    assert module.adapter.steps in (len(batches) - 1, len(batches) - 2)  # the first batch may be one window alone
    assert len(set(shapes)) == 1
