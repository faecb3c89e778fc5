"""Train the best language model that fits, code and weights together, in 16,000,000 bytes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.loading import LoadedModel, load_artifact

__version__ = "0.1.0"
__all__ = ["LoadedModel", "__version__", "load_artifact"]


def __getattr__(name: str) -> Any:
    """Import torch only when the model is wanted: `trainer --help` comes at once."""
    if name not in ("LoadedModel", "load_artifact"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer import loading  # noqa: PLC0415

    return getattr(loading, name)
