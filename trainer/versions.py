"""The libraries and the hardware behind a figure."""

import platform
from importlib.metadata import version

import torch

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
OPTIONAL = ("pyarrow", "triton", "flash_attn", "shtab", "brotli")  # imported only where they are there


def versions(device: torch.device) -> dict[str, str]:
    """Versions of Python, the packages and the device."""
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "device": hardware}
