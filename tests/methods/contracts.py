"""What each method declares of itself; the harness holds it to that. A new method is one line here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from families import MARKER

import veneer
from helpers import perturb
from veneer.methods import Method, method_class


@dataclass(frozen=True)
class Contract:
    """A method's promises.

    Attributes:
        settings: small ones, to test it with; none of them trivial (alpha other than rank).
        identity: the adapted model starts out equal to the base: bit for bit, to rounding, or not at all.
        merges: it folds into the base's weights wherever these have a place for it.
        detached: its gradient leaves a part out by definition, or has kinks all over, so that finite differences are
            not it.
        method: its name, where a method has further contracts: other settings make it another thing.
        unused: it holds parameters that a forward may have no use for.
        kept: it keeps parameters that were trained elsewhere, which are nothing where they come from nowhere.
        left: the share of its loss a student may be left with in test_learning.py.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    identity: Literal["bitwise", "rounding", "no"] = "bitwise"
    merges: bool = True
    detached: bool = False
    method: str = ""
    unused: bool = False
    kept: bool = False
    left: float = 0.05


CONTRACTS = {
    "adalora": Contract({"rank": 4, "target_rank": 2, "alpha": 7}),
    "bitfit": Contract(),
    "boft": Contract({"block_size": 4, "factors": 3}, identity="rounding"),
    "compacter": Contract({"bottleneck": 8, "n": 4}, merges=False),
    "conditional": Contract({"bottleneck": 3, "size": 4, "tasks": ["a", "b"]}, merges=False),
    "dora": Contract({"rank": 3, "alpha": 7}, detached=True),
    "fusion": Contract(
        {"methods": [{"name": "pfeiffer", "bottleneck": 3}, {"name": "houlsby", "bottleneck": 4}]},
        merges=False,
        kept=True,
    ),
    "diff-pruning": Contract({"density": 0.1, "structured": False}, detached=True),
    "fish": Contract({"share": 0.1}),
    "full": Contract(identity="rounding", unused=True),
    "hira": Contract({"rank": 3}),
    "houlsby": Contract({"bottleneck": 5}, merges=False),
    "ia3": Contract(),
    "loha": Contract({"rank": 2, "alpha": 3}),
    "lokr": Contract({"rank": 2, "alpha": 3}),
    "lora": Contract({"rank": 3, "alpha": 7}),
    "mam": Contract({"length": 2, "mlp_width": 6, "bottleneck": 5}, identity="no", merges=False),
    "mix": Contract({"methods": [{"name": "lora", "rank": 2, "alpha": 5}, "ia3", {"name": "norm"}]}),
    "norm": Contract(),
    "oft": Contract({"block_size": 8}, identity="rounding"),
    "parallel": Contract({"bottleneck": 5}, merges=False),
    "partial": Contract(),
    "pfeiffer": Contract({"reduction": 6}, merges=False),
    "prefix": Contract({"length": 3}, identity="no", merges=False),
    "prompt": Contract({"length": 3}, identity="no", merges=False),
    "prefix-mlp": Contract({"length": 3, "mlp": True, "mlp_width": 5}, identity="no", merges=False, method="prefix"),
    "ptuning": Contract({"length": 3}, identity="no", merges=False),
    "ptuning-mlp": Contract({"length": 3, "encoder": "mlp"}, identity="no", merges=False, method="ptuning"),
    "ptuning-slots": Contract(
        {"length": 5, "slots": (3,), "marker": MARKER, "encoder": None},
        identity="no",
        merges=False,
        method="ptuning",
        left=0.1,  # in the midst of a text they learn more slowly than before it: 3 % are left after 400 steps
    ),
    "ptuning2": Contract({"length": 2}, identity="no", merges=False),
    "rps": Contract({"bank_size": 64}),
    "shira": Contract({"rank": 2}),
    "unipelt": Contract({"rank": 2, "length": 2, "bottleneck": 3}, identity="no", merges=False),
    "unilora": Contract({"rank": 2, "bank_size": 50}, identity="rounding"),
    "tokens": Contract({"tokens": [5, 6, 9, 13, 16]}),
    "vblora": Contract({"rank": 2, "num_vectors": 6, "vector_length": 8, "topk": 3}, identity="no", left=0.1),
    "vera": Contract({"rank": 3}),
}


def method(name: str) -> Method:
    """The method with its contract's settings."""
    return method_class(CONTRACTS[name].method or name)(**CONTRACTS[name].settings)


def trained(adapter: veneer.Adapter, name: str, std: float = 0.2, seed: int = 2) -> None:
    """Random values for all it trains, and for what was trained elsewhere, so that nothing is as it starts."""
    perturb(adapter, std=std, seed=seed)
    if CONTRACTS[name].kept:
        generator = torch.Generator().manual_seed(seed)
        for value in adapter.buffers():
            value.copy_(torch.randn(value.shape, generator=generator) * std)
