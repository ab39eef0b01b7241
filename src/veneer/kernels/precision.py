"""Dtypes of what is computed in between."""

from __future__ import annotations

import torch


def wider(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
