"""Where LoRA's factors start from, other than Kaiming-uniform A and zero B.

    gaussian     A ~ N(0, 1/r²), B = 0
    orthogonal   A = X Q_even / 10, B = Y Q_odd / 10, with Q orthogonal: B A = 0 though neither is zero
    pissa        B A = the r largest singular triples of W / s (Meng et al. 2024, arXiv:2404.02948, §3)
    olora        B, A = the first r columns of Q and rows of R in W = Q R (Büyükakyüz 2024, arXiv:2406.01775, §3)
    loftq        s · B A = the r largest singular triples of W − Q, with Q the quantised weight
                 (Li et al. 2023, arXiv:2310.08659, Algorithm 1)

Algorithm 1 goes on from there, T times in all: it quantises ``W − s B A`` anew, which gives another Q, and decomposes
what is left again. A Q of one adapter's own is no base that others can share, so T is one here, where Q is that of the
plain weight. The adapted model then starts nearer to the unquantised base than the quantised base is.

Pissa and olora would have the base's weight lowered by s · B A, so that the sum is W again. The base is never changed
here: the factors at the start, A₀ and B₀, are kept beside those that learn, and the update is ``s (B A − B₀ A₀)``, of
rank 2r.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""A ``[r, in]`` and B ``[out, r]``."""


def gaussian(rank: int, weight: Tensor, scale: float, generator: torch.Generator) -> Factors:
    """Normal A, zero B."""
    return torch.randn(rank, weight.shape[1], generator=generator) / rank, torch.zeros(weight.shape[0], rank)


def orthogonal(rank: int, weight: Tensor, scale: float, generator: torch.Generator) -> Factors:
    """Factors in orthogonal halves of the rank, which must be even."""
    q = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = torch.randn(weight.shape[1], rank // 2, generator=generator) @ q[0::2] / 10
    b = torch.randn(weight.shape[0], rank // 2, generator=generator) @ q[1::2] / 10
    return a.mT.contiguous(), b


def pissa(rank: int, weight: Tensor, scale: float, generator: torch.Generator) -> Factors:
    """The principal singular triples, split evenly."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def olora(rank: int, weight: Tensor, scale: float, generator: torch.Generator) -> Factors:
    """The leading part of the QR decomposition."""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank].clone(), q[:, :rank].clone()


STARTS = {"gaussian": gaussian, "orthogonal": orthogonal, "pissa": pissa, "olora": olora, "loftq": pissa}
SHIFTING = ("pissa", "olora")
"""Those that don't start from no update."""
MENDING = ("loftq",)
"""Those of what quantising took from the weight, instead of the weight; they are meant to change what it computes."""
