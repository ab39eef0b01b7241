"""Low-rank factorisation of a base: a compression step, which writes a new base.

    W ≈ U V,    U = U_r √S_r,  V = √S_r V_rᵀ    of the singular value decomposition  W = U S Vᵀ

the best approximation of rank r in the Frobenius norm (Eckart & Young 1936); its relative error is ‖W − UV‖ / ‖W‖. A
map of ``in · out`` numbers becomes one of ``r (in + out)``: smaller only for r below ``in · out / (in + out)``, and
faster likewise. Trained weights are of nearly full rank, so that every cut is felt: train an adapter on the result to
make up for it (Hsu et al. 2022, FWSVD, arXiv:2207.00112, §1, on plain SVD's losses). No adapter, and not reversible.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from veneer.bases.factored import install, is_factored, write
from veneer.bases.loading import load_pretrained
from veneer.bases.pretrained import Pretrained
from veneer.bases.quiet import quiet
from veneer.bases.site import Site
from veneer.bases.sites import ALL_LINEAR
from veneer.errors import BaseError, ConfigError, OutputError
from veneer.storage import new_folder, write_json

REPORT = "factorization.json"
"""What was done, beside the model."""


@dataclass(frozen=True)
class FactoredMap:
    """What became of one map.

    Attributes:
        path: of the map.
        rank: of its factors; None where it was left whole, because they would not be smaller.
        error: relative, in the Frobenius norm.
        parameters: of its weight before and after.
    """

    path: str
    rank: int | None
    error: float
    parameters: tuple[int, int]


@dataclass(frozen=True)
class Factorization:
    """What `factorize` did.

    Attributes:
        output: the folder written.
        maps: each of the maps that were picked.
        parameters: of the whole base before and after.
        nbytes: of the whole base before and after.
    """

    output: Path
    maps: Sequence[FactoredMap]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]


def factorize(
    base: str | os.PathLike[str] | Pretrained,
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    keep: float | None = None,
    targets: str | Sequence[str] = ALL_LINEAR,
) -> Factorization:
    """Write a base whose linear maps are factored; `load_base` reads it. The one given stays as it is.

    Args:
        base: what `load_base` takes, or a base.
        output: the folder to write; it must not exist.
        rank: of every map.
        keep: or the share of its numbers that every map keeps, which decides the rank of each.
        targets: which maps, in the words of a method's ``targets``.

    Raises:
        ConfigError: neither or both of rank and keep are given, or no map would get smaller.
        TargetError: targets match nothing.
        BaseError: the base carries adapters, is quantised, or is not transformers'.
        OutputError: there is something at ``output``, or it cannot be written.
    """
    folder = Path(output)
    if folder.exists():
        raise OutputError(f"{folder} exists already; give a new folder.")
    _check(rank, keep)
    given = base if isinstance(base, Pretrained) else load_pretrained(base)
    _check_base(given)
    whole = given.parameter_count, given.nbytes
    model = copy.deepcopy(given.model) if given is base else given.model
    maps = [
        _factored(model, site, rank or _rank(site, keep or 1.0))
        for site in given.sites.resolve(targets, kinds=("linear",))
        if site.parameter is None and isinstance(model.get_submodule(site.path), nn.Linear)
    ]
    if all(each.rank is None for each in maps):
        raise ConfigError(_no_gain(given, maps, rank, keep))
    new = Pretrained(model)
    with new_folder(folder) as temporary, quiet():
        write(model, given.tokenizer, temporary)
        origin = {"name": given.name, "revision": given.revision}
        write_json(temporary / REPORT, {"base": origin, "maps": [asdict(each) for each in maps]})
    return Factorization(folder, maps, (whole[0], new.parameter_count), (whole[1], new.nbytes))


def _check(rank: int | None, keep: float | None) -> None:
    if (rank is None) == (keep is None):
        raise ConfigError("Give either rank (of every map) or keep (the share of its numbers that every map keeps).")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is at least 1, not {rank}.")
    if keep is not None and not 0 < keep < 1:
        raise ConfigError(f"keep is a share between 0 and 1, not {keep:g}.")


def _check_base(base: Pretrained) -> None:
    if getattr(base, "adapters", None):
        raise BaseError(f"{base.name} carries adapters; detach them, or merge one and factorise the merged base.")
    if not hasattr(base.model, "save_pretrained"):
        raise BaseError(f"{type(base.model).__name__} is no model of transformers, which alone can be written.")
    if getattr(base.model, "hf_quantizer", None) is not None:
        raise BaseError(f"{base.name} is quantised; factorise the base it was made from.")


def _rank(site: Site, keep: float) -> int:
    """With which a map keeps this share of its numbers."""
    return max(1, int(keep * site.in_features * site.out_features / (site.in_features + site.out_features)))


def _factored(model: nn.Module, site: Site, rank: int) -> FactoredMap:
    """Put factors of this rank into the place of a map, unless they would not be smaller."""
    linear = model.get_submodule(site.path)
    assert isinstance(linear, nn.Linear)
    before = sum(value.numel() for name, value in linear.named_parameters() if name != "bias")
    after = rank * (site.in_features + site.out_features)
    if after >= before:
        return FactoredMap(site.path, None, 0.0, (before, before))
    with torch.no_grad():
        install(model, {site.path: rank})
        factors, weight = model.get_submodule(site.path), linear.weight.double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:rank].sqrt()
        factors.U.copy_(left[:, :rank] * root)  # type: ignore[operator]
        factors.V.copy_(root[:, None] * right[:rank])  # type: ignore[operator]
        off = weight - factors.U.double() @ factors.V.double()  # type: ignore[operator]
        return FactoredMap(site.path, rank, float(off.norm() / weight.norm().clamp(min=1e-30)), (before, after))


def _no_gain(base: Pretrained, maps: Sequence[FactoredMap], rank: int | None, keep: float | None) -> str:
    if not maps:
        return "None of these maps is a linear module of its own; only such are factored."
    asked, less = (f"rank {rank}", "a lower rank") if rank is not None else (f"keep {keep:g}", "a smaller share")
    already = " They are factored already, and shares are of the whole maps." if is_factored(base.model) else ""
    return f"No map would get smaller with {asked}: factors of rank r hold r (in + out) numbers.{already} Take {less}."
