"""Train the best language model that fits, code and weights together, in 16,000,000 bytes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.cpu import share_cpu

if TYPE_CHECKING:
    from trainer.api import TrainedRun, Validation, fit, generate, load_artifact, score, validate
    from trainer.errors import UserError
    from trainer.loading import LoadedModel

__version__ = "0.1.0"
__all__ = [
    "LoadedModel",
    "TrainedRun",
    "UserError",
    "Validation",
    "__version__",
    "fit",
    "generate",
    "load_artifact",
    "score",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import torch and Lightning only when they are needed: `trainer --help` comes at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    share_cpu()
    module = {"LoadedModel": "loading", "load_artifact": "loading", "UserError": "errors"}.get(name, "api")
    return getattr(import_module(f"trainer.{module}"), name)
