"""Memory of this process on the device it computes on: now, and at most since the peak was forgotten. In bytes."""

from __future__ import annotations

from pathlib import Path

import torch


def held(device: torch.device) -> int:
    """What is held now: resident memory of the process, or what torch has on the GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Let `peak` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most that was held."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
