"""Which operators written in Triton are used on this device: those that run there."""

from collections.abc import Mapping

import torch

from trainer.errors import UserError
from trainer.model import fused_heads, fused_loss, fused_mlp
from trainer.model.fusion import Fused
from trainer.model.transformer import TransformerConfig


def choose_fused(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, runs: Mapping[str, bool] | None = None
) -> Fused:
    """Try every operator forward and backward, unless the config forbids them.

    Args:
        config: Of the model; its `fused` is the choice.
        device: Where the model runs.
        dtype: Type of the activations.
        runs: What would be found; for tests.

    Raises:
        UserError: If they are asked for and one does not run.
    """
    if config.fused == "off":
        return Fused()
    if device.type != "cuda":
        found = Fused()
    elif runs is not None:
        found = Fused(**runs)
    else:
        widths = config.model_dim, config.mlp.ratio * config.model_dim
        found = Fused(
            fused_mlp.runs_on(widths, config.mlp.negative_slope, device, dtype),
            fused_heads.runs_on(config.heads, device, dtype),
            fused_loss.runs_on(config.logit_softcap, device, dtype),
        )
    if config.fused == "on" and not all(found):
        missing = ", ".join(name for name, used in found._asdict().items() if not used)
        raise UserError(
            f"model.fused 'on': not on {device.type} in {dtype} with this model: {missing}; what each needs stands in "
            "--help, auto uses those that run"
        )
    return found
