"""Entries of a weight: what methods that change chosen ones only keep, and how they choose them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VALUES, INDICES = "sparse_values", "sparse_indices"
"""Values ``[nnz]``; rows and columns ``[2, nnz]``, int32."""


def entries(chosen: Tensor, columns: int, values: Tensor | None = None) -> dict[str, Tensor]:
    """Parameters for entries of a weight, zero unless given.

    Args:
        chosen: where, ``[nnz]``, counted row by row.
        columns: of the weight.
        values: ``[nnz]``.
    """
    chosen = chosen.long().sort().values if values is None else chosen.long()
    indices = torch.stack([chosen // columns, chosen % columns]).to(torch.int32)
    return {VALUES: torch.zeros(len(chosen), device=chosen.device) if values is None else values, INDICES: indices}


def greatest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Where the ``count`` greatest of all scores are: as many exactly, also among equals.

    Returns:
        Name -> indices ``[nnz]`` into its flattened scores, rising; none for those without.
    """
    best = {name: value.flatten().topk(min(count, value.numel())) for name, value in scores.items()}
    everything = torch.cat([found.values for found in best.values()])
    chosen = torch.zeros(len(everything), dtype=torch.bool, device=everything.device)
    chosen[everything.topk(min(count, len(everything))).indices] = True
    parts = chosen.split([len(found.values) for found in best.values()])
    return {name: found.indices[part].sort().values for (name, found), part in zip(best.items(), parts, strict=True)}


def distinct(count: int, total: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``total``, sorted; a permutation of millions would take seconds a map."""
    chosen = torch.empty(0, dtype=torch.long)
    while len(chosen) < count:
        more = torch.randint(total, (count,), generator=generator)
        chosen = torch.cat([chosen, more]).unique()
    keep = torch.randperm(len(chosen), generator=generator)[:count]
    return chosen[keep].sort().values


def fault(values: Tensor, *indices: tuple[Tensor, int]) -> str | None:
    """What is wrong with entries that a file has.

    Args:
        values: of the entries.
        indices: along each axis, and the axis's length.
    """
    if values.dim() != 1 or any(index.shape != values.shape for index, _ in indices):
        return "as many indices as values are needed"
    for index, size in indices:
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            return f"its indices go up to {int(index.max())}, beyond {size}, or below zero"
    return None


def matrix_fault(values: Tensor, indices: Tensor, rows: int, columns: int) -> str | None:
    """`fault`, of entries of a matrix."""
    if indices.dim() != 2 or len(indices) != 2:
        return "rows and columns are needed"
    return fault(values, (indices[0], rows), (indices[1], columns))
