"""Parts of the model that operators written in Triton may compute."""

from typing import Literal, NamedTuple

Fusion = Literal["auto", "on", "off"]


class Fused(NamedTuple):
    """Parts of the model that are computed by an operator of their own; the others follow their formulas."""

    mlp: bool = False
    heads: bool = False
    loss: bool = False

    def describe(self) -> str:
        """The parts in words, for the log."""
        return ", ".join(name for name, used in self._asdict().items() if used) or "none"
