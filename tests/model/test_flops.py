"""FLOPs are those that torch's own counter sees."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import TINY
from trainer.kernels.attention_backends import SdpaBackend
from trainer.kernels.fusion import Fused
from trainer.model.config import TransformerConfig
from trainer.model.flops import PEAK_FLOPS, forward_flops, peak_flops
from trainer.model.transformer import Transformer


def test_an_attention_window_costs_the_keys_inside_it():
    config = replace(TINY, attention=replace(TINY.attention, window=5, window_pattern="SL"))
    keys = sum(min(position + 1, 5) for position in range(16)) / 16
    heads, _, width = config.heads
    saved = 2 * 4 * heads * width * (17 / 2 - keys)  # in two blocks of four
    assert forward_flops(TINY, 16) - forward_flops(config, 16) == pytest.approx(saved)


@pytest.mark.parametrize("config", [TINY, TransformerConfig(num_layers=2)])
def test_the_count_is_torchs_with_half_of_the_attention(config: TransformerConfig):
    """torch counts all pairs of positions; causal attention needs those up to its own, (T + 1) / 2 of T."""
    length, model = 64, Transformer(config)
    model.set_kernels(SdpaBackend("math"), Fused())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int32))
    heads, _, width = config.heads
    pairs = config.num_layers * 4 * heads * width * length * length
    expected = counter.get_total_flops() - pairs + pairs * (length + 1) / 2 / length
    assert forward_flops(config, length) * length == pytest.approx(expected, rel=1e-6)


def test_the_reference_model_costs_what_its_authors_counted():
    """145 MFLOPs in matrices and 63 in attention per training token."""
    config = TransformerConfig()
    assert 3 * forward_flops(config, 2048) == pytest.approx(208e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA Something 5", None),
    ],
)
def test_the_peak_is_that_of_the_named_gpu(monkeypatch: pytest.MonkeyPatch, name: str, key: str | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (PEAK_FLOPS[key] if key else None)
    assert peak_flops(torch.device("cpu")) is None
