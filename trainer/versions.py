"""The libraries and the hardware behind a figure."""

import platform
from importlib.metadata import version

import torch

from trainer.device import device_name

PACKAGES = (
    "torch",
    "lightning",
    "numpy",
    "sentencepiece",
    "zstandard",
    "constriction",
    "torchmetrics",
    "jsonargparse",
    "docstring_parser",
    "pyyaml",
    "rich",
    "huggingface_hub",
    "typing_extensions",
)
EXTRAS = {"jsonargparse": "[signatures]"}
# Imported only where they are there.
OPTIONAL = ("pyarrow", "triton", "flash_attn", "shtab", "brotli", "safetensors", "lm_eval")


def versions(device: torch.device) -> dict[str, str]:
    """Versions of Python, the packages and the device."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": device_name(device),
    }
