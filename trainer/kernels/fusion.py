"""Which parts of the model fused operators, written in Triton, compute."""

from typing import Literal, NamedTuple

Fusion = Literal["auto", "on", "off"]


class Fused(NamedTuple):
    """Parts that a fused operator computes; the others follow their formulas."""

    mlp: bool = False
    heads: bool = False
    loss: bool = False

    def describe(self) -> str:
        """The fused parts, for the log."""
        return ", ".join(name for name, is_fused in self._asdict().items() if is_fused) or "none"
