"""Which fused operators are used, by a table of what runs where."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import TINY
from trainer.errors import UserError
from trainer.kernels.attention_backends import SdpaBackend
from trainer.kernels.fusion import Fused
from trainer.model.kernel_choice import choose_fused
from trainer.model.transformer import Block, Transformer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALL = {"mlp": True, "heads": True, "loss": True}
NO_MLP = ALL | {"mlp": False}  # an older GPU than Hopper


@pytest.mark.parametrize(
    ("choice", "device", "runs", "expected"),
    [
        ("auto", GPU, ALL, Fused(True, True, True)),
        ("auto", GPU, NO_MLP, Fused(False, True, True)),
        ("auto", CPU, ALL, Fused()),
        ("off", GPU, ALL, Fused()),
        ("on", GPU, ALL, Fused(True, True, True)),
    ],
)
def test_operators_are_used_where_they_run(choice, device, runs, expected):
    assert choose_fused(replace(TINY, fused=choice), device, torch.bfloat16, runs) == expected


def test_demanded_operators_that_do_not_run_are_refused():
    with pytest.raises(UserError, match=r"model\.fused 'on': these do not run on cuda in torch.bfloat16 .*: mlp; use"):
        choose_fused(replace(TINY, fused="on"), GPU, torch.bfloat16, NO_MLP)
    with pytest.raises(UserError, match=r"model\.fused 'on': these do not run on cpu in .*: mlp, heads, loss; use"):
        choose_fused(replace(TINY, fused="on"), CPU, torch.bfloat16)


@pytest.mark.parametrize("fused", [Fused(mlp=True), Fused(heads=True), Fused(loss=True)])
def test_each_operator_is_switched_by_itself(fused: Fused):
    model = Transformer(TINY)
    model.set_kernels(SdpaBackend(), fused)
    for block in model.blocks:
        assert isinstance(block, Block)
        assert Fused(block.mlp.is_fused, block.attention.is_fused, model.has_fused_loss) == fused


def test_the_log_names_what_is_used():
    assert Fused(True, False, True).describe() == "mlp, loss"
    assert Fused().describe() == "none"
