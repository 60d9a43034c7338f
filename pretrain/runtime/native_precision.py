"""Which precision a device computes in by instructions of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo: two of x86, one of ARM


def native_precision(device: torch.device) -> Precision:
    """bf16 where a device has instructions for it; elsewhere it is emulated, several times slower than fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        return "bf16" if cpu_has_bf16(Path("/proc/cpuinfo").read_text()) else "fp32"
    except OSError:
        return "fp32"


def cpu_has_bf16(cpuinfo: str) -> bool:
    """Whether every processor that `/proc/cpuinfo` lists has instructions for products in bf16."""
    lines = [line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    return bool(lines) and all(not _FLAGS.isdisjoint(flags) for flags in lines)
