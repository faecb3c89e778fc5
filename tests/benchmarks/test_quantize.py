"""The divergence that `benchmarks.quantize` reports, in numpy."""

import numpy as np
import pytest
import torch

from benchmarks.quantize import divergence


def test_divergence_is_from_the_original_to_the_other():
    rng = np.random.default_rng(0)
    p, q = (each / each.sum(-1, keepdims=True) for each in rng.random((2, 3, 5, 7)) ** 3)
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert abs(expected - (q * np.log(q / p)).sum(-1).mean()) > 0.01  # the other way around it is another number
    # Logits may be shifted.
    assert divergence(torch.tensor(p).log() + 3, torch.tensor(q).log() - 1) == pytest.approx(expected, abs=1e-9)
