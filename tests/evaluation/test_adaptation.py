"""Test-time training never lets a target be learned before it is scored, and it learns."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import TINY
from trainer.data.tokenizer import ByteTable, load_tokenizer
from trainer.errors import UserError
from trainer.evaluation.adaptation import Adapter
from trainer.evaluation.metric import BitsPerByte
from trainer.evaluation.sliding import WindowScorer
from trainer.evaluation.windows import EvaluationConfig, batch_plan, plan_windows
from trainer.lightning_module import LanguageModel
from trainer.model.transformer import Transformer


def losses(tokens: torch.Tensor, rate: float, shard_folder, batch_windows: int = 2) -> tuple[torch.Tensor, list[int]]:
    """The loss of every target in the order of the text, and how many were scored before each step."""
    torch.manual_seed(0)
    model = Transformer(TINY)
    table = ByteTable.from_tokenizer(load_tokenizer(shard_folder / "tokenizer.model"))
    plan = plan_windows(len(tokens) - 1, 32, 8)
    scorer, adapter = WindowScorer(tokens, table, 32), Adapter(model.parameters(), model.nll, rate, 16)
    found, steps = torch.full((len(tokens) - 1,), float("nan")), []

    def nll(inputs: torch.Tensor, targets: torch.Tensor, first: int) -> torch.Tensor:
        values = model.nll(inputs, targets, first)
        for row, (start, scored_from) in enumerate(zip(batch.starts, batch.scored_from, strict=True)):
            if scored_from < 32:
                found[start + scored_from : start + 32] = values[row, scored_from - first :]
        return values

    for batch in batch_plan(plan, batch_windows):
        scorer.add(BitsPerByte(), nll, batch)
        stretch = scorer.scored(batch)
        begin = sum(steps)
        assert torch.equal(stretch, tokens[begin : begin + len(stretch)])
        steps.append(len(stretch) - 1)
        adapter.learn(stretch)
    return found, steps


def test_what_is_learned_was_scored_and_every_target_is_scored_once(shard_folder):
    tokens = torch.randint(4, 300, (150,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    plain, steps = losses(tokens, 0.0, shard_folder)
    adapted, _ = losses(tokens, 0.1, shard_folder)
    assert sum(steps) == 149
    assert not adapted.isnan().any()
    assert torch.equal(adapted[: steps[0]], plain[: steps[0]])  # the first batch meets the model as it was
    assert (adapted[steps[0] :] != plain[steps[0] :]).all()


def test_float16_is_refused(monkeypatch):
    """Gradients of a mean over thousands of targets are below what it can hold."""
    config = EvaluationConfig(adapt_rate=0.1)
    for precision in ("32-true", "16-mixed"):
        trainer = SimpleNamespace(world_size=1, precision=precision, datamodule=SimpleNamespace(evaluation=config))
        monkeypatch.setattr(LanguageModel, "trainer", trainer)
        module = LanguageModel(vocab_size=16, num_layers=2, model_dim=16)
        module.nll = module.model.nll
        if precision == "16-mixed":
            with pytest.raises(UserError, match="vanish in float16"):
                module._adapter()
        else:
            assert module._adapter() is not None


def test_no_score_depends_on_a_later_token(shard_folder):
    tokens = torch.randint(4, 300, (150,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    before, _ = losses(tokens, 0.1, shard_folder)
    for place in (60, 100, 149):
        changed = tokens.clone()
        changed[place] = 3 + changed[place] % 290
        after, _ = losses(changed, 0.1, shard_folder)
        assert torch.equal(after[: place - 1], before[: place - 1])  # target i is token i + 1
        assert not torch.equal(after[place - 1 :], before[place - 1 :])


def test_it_learns_a_text_that_repeats_itself(shard_folder):
    piece = torch.randint(4, 300, (25,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    tokens = piece.repeat(30)
    plain, _ = losses(tokens, 0.0, shard_folder)
    adapted, _ = losses(tokens, 0.1, shard_folder)
    assert adapted[-100:].mean() < plain[-100:].mean() - 0.5
