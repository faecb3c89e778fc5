"""Which fused operators are used, by a table of what runs where."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import TINY
from trainer.errors import UserError
from trainer.model.fusion import Fused, choose_fused

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


def test_operators_that_are_asked_for_in_vain_are_refused():
    said = r"model\.fused 'on': mlp does not run on cuda in torch.bfloat16; use auto or off"
    with pytest.raises(UserError, match=said):
        choose_fused(replace(TINY, fused="on"), GPU, torch.bfloat16, NO_MLP)
    with pytest.raises(UserError, match=r"model\.fused 'on': mlp, heads, loss does not run on cpu"):
        choose_fused(replace(TINY, fused="on"), CPU, torch.bfloat16)


def test_the_log_names_what_is_used():
    assert Fused(True, False, True).describe() == "mlp, loss"
    assert Fused().describe() == "none"
