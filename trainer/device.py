"""What is asked of a GPU's runtime outside of the kernels; torch serves AMD's under the names of NVIDIA's."""

import os
import platform

import torch


def default_device() -> torch.device:
    """The GPU of this machine, or its CPU. Apple's GPUs have no float64, which exact sums need."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu_count() -> int:
    """Number of GPUs."""
    return torch.cuda.device_count()


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself; emulating it would be slow."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for everything that is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Mark what is queued on a GPU so far, to wait for it later; None on a CPU, which queues nothing."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def available_memory(device: torch.device) -> int:
    """Bytes that this process can have: what is free on a GPU, and all memory of a machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, int(total * torch.cuda.get_per_process_memory_fraction(device)))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors have taken on a GPU since the last `release_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release_memory(device: torch.device) -> None:
    """Give unused memory back to a GPU, and forget how much was taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
