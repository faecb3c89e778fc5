"""Every target scored exactly once, and the score against a plain loop."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import TINY
from trainer.data.tokenizer import ByteTable, load_tokenizer
from trainer.errors import UserError
from trainer.evaluation.metric import BitsPerByte
from trainer.evaluation.sliding import WindowScorer, score
from trainer.evaluation.windows import EvaluationConfig, batch_plan, plan_windows
from trainer.model.transformer import Transformer
from trainer.step import StepFence


@settings(deadline=None)
@given(
    n=st.integers(1, 5000),
    window=st.sampled_from([8, 64, 2048]),
    stride=st.none() | st.integers(1, 2048),
    batch=st.sampled_from([1, 7, 64]),
    world=st.sampled_from([1, 2, 3]),
)
def test_every_target_is_scored_exactly_once_with_enough_context(n, window, stride, batch, world):
    plan = plan_windows(n, window, stride)
    counts = np.zeros(n, dtype=int)
    for rank in range(world):
        for part in batch_plan(plan, batch, rank, world):
            assert len(part.starts) == min(batch, -(-len(plan.starts) // world))
            assert (part.scored_from >= part.start_pos).all()
            for start, scored_from in zip(part.starts.tolist(), part.scored_from.tolist(), strict=True):
                assert 0 <= start <= n - plan.window
                counts[start + scored_from : start + plan.window] += 1
                context = min(stride or window, window)
                assert start == 0 or scored_from >= plan.window - context
    assert (counts == 1).all()


def test_planning_reads_a_long_split_once_and_not_once_per_batch():
    # for the challenge's 62,021,846 targets, 15,142 batches each looked at 969,061 windows, which took minutes
    plan = plan_windows(6_000_000, 2048, 64)
    looked_at = 0

    class Elements(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal looked_at
            result = func(*args, **kwargs or {})
            looked_at += sum(each.numel() for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor))
            return result

    with Elements():
        batches = batch_plan(plan, 64)
    assert len(batches) == 1 + math.ceil((len(plan.starts) - 1) / 64)
    assert {len(batch.starts) for batch in batches} == {64}
    assert looked_at < 50 * len(plan.starts)


def test_the_metric_stays_float64_and_ignores_what_is_not_scored():
    metric = BitsPerByte().half().float()
    assert metric.nll.dtype == torch.float64
    metric.update(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([3, 4, 5]), torch.tensor([True, True, False]))
    values = metric.score()
    assert values.bpb == 3 / math.log(2) / 7
    assert (values.loss, values.tokens, values.bytes) == (1.5, 2, 7)


def test_sliding_score_equals_a_plain_loop_and_is_the_same_for_two_processes(shard_folder: Path):
    torch.manual_seed(0)
    model = Transformer(TINY).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    table = ByteTable.from_tokenizer(load_tokenizer(shard_folder / "tokenizer.model"))
    tokens = torch.randint(4, 300, (134,), dtype=torch.int32)
    config = EvaluationConfig(window=32, stride=8, batch_windows=4)
    result = score(model.nll, tokens, table, config)
    total, bytes_total = 0.0, 0
    for target in range(133):
        # the window that scores it: the first one, or the earliest of stride 8 that reaches it
        end = 32 if target < 32 else min(32 + 8 * math.ceil((target - 31) / 8), 133)
        logits = model(tokens[end - 32 : end][None].long())[0, target - (end - 32)].detach()
        total -= float(torch.log_softmax(logits, -1)[tokens[target + 1].long()])
        bytes_total += int(table.count(tokens[target], tokens[target + 1]))
    assert math.isclose(result.bpb, total / math.log(2) / bytes_total, rel_tol=1e-9)
    assert (result.tokens, result.bytes) == (133, bytes_total)
    parts = [score(model.nll, tokens, table, config, rank, 2) for rank in range(2)]
    assert sum(part.tokens for part in parts) == 133
    assert sum(part.bytes for part in parts) == bytes_total
    for limit in (50, 51):
        assert score(model.nll, tokens, table, replace(config, max_tokens=limit)).tokens == limit
    assert len(WindowScorer(tokens[:21], table, 32).offsets) == 20  # fewer targets than the window
    assert len(WindowScorer(tokens, table, 32).offsets) == 32


@pytest.mark.parametrize("ahead", [0, 2])
def test_progress_tells_of_every_batch(ahead: int, shard_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The host of a GPU is two batches ahead."""
    init = StepFence.__init__

    def queueing(fence: StepFence, device: torch.device) -> None:
        init(fence, device)
        fence._depth = ahead

    monkeypatch.setattr(StepFence, "__init__", queueing)
    table = ByteTable.from_tokenizer(load_tokenizer(shard_folder / "tokenizer.model"))
    tokens = torch.randint(4, 300, (134,), dtype=torch.int32)
    calls: list[tuple[int, int]] = []
    config = EvaluationConfig(window=32, stride=8, batch_windows=4)
    nll = Transformer(TINY).nll
    score(nll, tokens, table, config, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]  # the first window alone, then 13 in batches of 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, r"eval\.window must be at least 1,? not 0"),
        ({"batch_windows": 0}, r"eval\.batch_windows must be at least 1,? not 0"),
        ({"stride": 0}, r"eval\.stride must be at least 1, or null, not 0"),
        ({"fit_tokens": 0}, r"eval\.fit_tokens must be at least 1, or null, not 0"),
        ({"max_tokens": 0}, r"eval\.max_tokens must be at least 1, or null, not 0"),
        ({"attention_window": 0}, r"eval\.attention_window must be at least 1, or null, not 0"),
        ({"adapt_rate": -0.1}, r"eval\.adapt_rate must be above 0 and at most 100, or null for no training, not -0\.1"),
        ({"adapt_rate": 1e39}, r"eval\.adapt_rate must be above 0 and at most 100"),
        ({"adapt_rate": 0.0}, r"eval\.adapt_rate must be above 0 and at most 100, or null for no training, not 0\.0"),
        ({"adapt_rate": 0.1, "adapt_ema_decay": 1.0}, r"must be in \[0, 1\), or null for no average, not 1\.0"),
        ({"adapt_rate": 0.1, "adapt_ema_decay": -0.1}, r"eval\.adapt_ema_decay must be in \[0, 1\)"),
        ({"adapt_ema_decay": 0.9}, r"eval\.adapt_ema_decay averages the weights that eval\.adapt_rate trains"),
        ({"attention_window": 2000, "stride": 64}, "together must not exceed"),
        ({"attention_window": 2000, "stride": None}, "together must not exceed"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options)


def test_the_smallest_settings_are_settings():
    config = EvaluationConfig(window=2, stride=1, batch_windows=1, fit_tokens=1, max_tokens=1, attention_window=1)
    assert (config.plain.window, config.plain.stride) == (1, None)
    assert not EvaluationConfig(window=8, stride=2, attention_window=4).is_plain
    with pytest.raises(UserError, match="no validation target to score"):
        plan_windows(0, 8, None)


def test_null_means_off_or_all():
    config = EvaluationConfig(window=8192, stride=6144, attention_window=2048, adapt_rate=0.1, adapt_ema_decay=0.9)
    assert not config.is_plain
    assert config.plain == EvaluationConfig(window=2048, stride=None)
    assert config.plain.is_plain
    assert EvaluationConfig(window=64, stride=64).is_plain
    assert not EvaluationConfig(window=64, stride=63).is_plain
