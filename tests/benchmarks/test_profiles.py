"""What the speed benchmarks measure, and what they compute from a profile."""

import pytest
import torch

from benchmarks.profile import by_time, idle, union
from benchmarks.scaling import device_times, replicated, table
from benchmarks.subject import load
from trainer.optim import newton_schulz


def test_a_benchmark_measures_the_model_of_the_recipe_with_its_vocabulary():
    cli = load("frontier", [])
    assert cli.model.model.config.vocab_size == cli.datamodule.vocab_size == 8192
    assert cli.datamodule.source.known_vocab_size() is None  # the tokenizer is trained for the model


def test_collectives_count_as_exposed_only_where_nothing_is_computed():
    kernels = [
        ("gemm", (0.0, 1000.0)),
        ("ncclDevKernel_AllReduce_Sum", (500.0, 1500.0)),  # half of it during the product
        ("ncclDevKernel_AllGather_RING", (1500.0, 1700.0)),
        ("norm", (2000.0, 2100.0)),
    ]
    times = device_times(kernels, steps=2)
    expected = {
        "all_reduce_ms": 0.5,
        "all_gather_ms": 0.1,
        "collectives_not_hidden_ms": 0.35,
        "computing_ms": 0.55,
        "gpu_idle_ms": 0.15,
    }
    assert times == pytest.approx(expected)
    assert device_times([], 2) == {}


def test_overlapping_intervals_are_merged():
    assert union([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0)]) == [(0.0, 2.0), (3.0, 4.0)]
    assert idle([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0)]) == 1.0


def test_replicated_orthogonalization_gives_the_same_results(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    stacks = [torch.randn(shape) for shape in ((3, 4, 6), (2, 6, 4), (1, 5, 5))]
    divided = newton_schulz.orthogonalize(stacks, 5)
    monkeypatch.setattr(newton_schulz, "_divided", replicated)
    assert all(torch.equal(a, b) for a, b in zip(divided, newton_schulz.orthogonalize(stacks, 5), strict=True))


def test_table_compares_with_the_first_row():
    rows = [{"devices": 1, "tokens_per_second": 100}, {"devices": 2, "tokens_per_second": 190}]
    assert table(rows).splitlines()[-1] == "| 2 | 190 | 0.950 |"


def test_kernels_are_added_up_by_name():
    kernels = [("norm", (0.0, 3.0)), ("gemm", (3.0, 8.0)), ("norm", (9.0, 13.0))]
    assert by_time(kernels) == [("norm", 2, 7.0), ("gemm", 1, 5.0)]
