"""Any change of a linear map as a low-rank one.

A low-rank delta is taken as it is; of any other, what it adds to the weight is decomposed,

    ΔW = U S Vᵀ ≈ (U_r √S_r) (√S_r V_rᵀ)

which is the best approximation of rank r (Eckart & Young 1936); its error is ‖ΔW − BA‖ / ‖ΔW‖.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas import Delta, LowRank, ScaledLowRank
from veneer.errors import AdapterError


@dataclass(frozen=True)
class Factors:
    """A low-rank change, its scale folded in.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        error: relative, in the Frobenius norm; 0 where it is exact.
    """

    a: Tensor
    b: Tensor
    error: float = 0.0


def factors_of(delta: Delta, parameters: Mapping[str, Tensor], rank: int | None) -> Factors:
    """A delta at a linear map with these parameters, of this rank at most; None takes exact ones only.

    Raises:
        AdapterError: it changes more than the weight, or is not of low rank though it has to be.
    """
    if isinstance(delta, ScaledLowRank):
        delta = delta.folded
    if type(delta) is LowRank and (rank is None or len(delta.A) <= rank):
        return Factors(delta.A.detach().clone(), (delta.B * delta.scale).detach())
    with torch.no_grad():
        wide = {name: value.double() for name, value in parameters.items()}
        new = delta.changed(wide)
        if other := [name for name, value in new.items() if name != "weight" and not torch.equal(value, wide[name])]:
            raise AdapterError(f"it changes the {', '.join(other)}, not the weight alone.")
        if rank is None:
            raise AdapterError("its change is not of low rank by construction; give a rank to have it approximated.")
        change = new["weight"] - wide["weight"]
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:rank].sqrt()
        left_out, whole = float(s[rank:].norm()), float(s.norm())
        return Factors(
            (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float(), left_out / whole if whole else 0.0
        )
