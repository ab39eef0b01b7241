"""EVA: where LoRA starts from, told by the data (Paischer et al. 2024, arXiv:2410.07170, §3).

    A = the r leading right singular vectors of a map's centred inputs X,     B = 0

X is not kept: its vectors are brought up to date batch by batch (incremental PCA, Ross et al. 2008, §3.3),

    SVD of [ S V ;  X_b − x̄_b ;  √(n m / (n + m)) (x̄ − x̄_b) ]

with n tokens of mean x̄ seen before the m tokens of mean x̄_b. Ranks go where they explain most: of all maps' vectors,
at most ρ r of each, those with the greatest share of their map's variance are taken until the ranks are spent. Scales
stay as they were. Unlike peft, every map keeps at least one vector, all tokens that are no padding count, and one pass
over the rows is made rather than as many as convergence takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_OVERSAMPLING = 8


def directions(inputs: Iterable[Mapping[str, Tensor]], ranks: Mapping[str, int], rho: float) -> dict[str, Tensor]:
    """A for each map whose inputs are among these.

    Args:
        inputs: batches, by a map's path ``[tokens, in]``.
        ranks: the rank each map would have, and all together are to have.
        rho: how many times its own a map may get.
    """
    spectra: dict[str, Spectrum] = {}
    for batch in inputs:
        for path, x in batch.items():
            spectra.setdefault(path, Spectrum(max(round(ranks[path] * rho), 1))).add(x)
    budget = sum(ranks[path] for path in spectra)
    spent = spread({path: spectrum.shares for path, spectrum in spectra.items()}, budget)
    return {path: spectrum.directions[: spent[path]].clone() for path, spectrum in spectra.items()}


class Spectrum:
    """The leading principal directions of a stream of vectors.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self._mean: Tensor | None = None
        self._weighted: Tensor | None = None  # S V
        self._energy = 0.0

    def add(self, x: Tensor) -> None:
        """Take vectors ``[m, in]`` into account."""
        mean, own = x.mean(0), len(x)
        rows = [x - mean]
        if self._mean is None or self._weighted is None:
            self._mean = mean
        else:
            shift = math.sqrt(self.seen * own / (self.seen + own)) * (self._mean - mean)
            rows += [self._weighted, shift[None]]
            self._energy += float(shift.double().square().sum())
            self._mean = self._mean + (mean - self._mean) * (own / (self.seen + own))
        self.seen += own
        self._energy += float(rows[0].double().square().sum())
        s, v = _leading(torch.cat(rows), self.count)
        self._weighted = s[:, None] * v

    @property
    def directions(self) -> Tensor:
        """``[count, in]``, orthonormal, greatest variance first; fewer if there weren't as many vectors."""
        assert self._weighted is not None
        return torch.nn.functional.normalize(self._weighted, dim=1)

    @property
    def shares(self) -> Tensor:
        """Of the variance, for each direction."""
        assert self._weighted is not None
        return self._weighted.double().square().sum(1) / max(self._energy, 1e-30)


def _leading(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest singular values and their right vectors ``[count, in]``; of large matrices by a random sketch."""
    if min(x.shape) <= 4 * (count + _OVERSAMPLING):
        _, s, v = torch.linalg.svd(x, full_matrices=False)
        return s[:count], v[:count]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, s, v = torch.svd_lowrank(x, q=count + _OVERSAMPLING, niter=4)
    return s[:count], v.mT[:count]


def spread(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many directions each map gets of so many for all: at least one, the others by their shares."""
    owners = [path for path, values in shares.items() for _ in values[1:]]
    rest = torch.cat([values[1:] for values in shares.values()])
    chosen = rest.argsort(descending=True, stable=True)[: max(budget - len(shares), 0)].tolist()
    ranks = dict.fromkeys(shares, 1)
    for index in chosen:
        ranks[owners[index]] += 1
    return ranks
