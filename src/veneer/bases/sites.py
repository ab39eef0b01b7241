"""Sites: the places in a base where something can act, and the words that pick them.

A site is a module with a role (``q``, ``up`` …), a group (``attention``, ``mlp``), and the index of the layer it
belongs to. Roles come from a table per naming convention; a linear map nobody listed is still a site, without a
role, and can be picked by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from veneer.errors import TargetError, did_you_mean

ALL_LINEAR = "all-linear"
GROUPS = ("attention", "mlp")


@dataclass(frozen=True)
class Site:
    """One place where a delta can act.

    Attributes:
        path: the module's dotted path in the model.
        in_features: width of its input.
        out_features: width of its output.
        role: the field's short name for it (``q k v o gate up down``), or None if nobody listed it.
        group: ``attention`` or ``mlp``, or None.
        layer: index of the layer it lies in, or None outside the layers.
    """

    path: str
    in_features: int
    out_features: int
    role: str | None = None
    group: str | None = None
    layer: int | None = None


# Naming convention -> role and group, by the end of the module's path. Longer endings are tried first.
_ROLES: Mapping[str, tuple[str, str]] = {
    # Llama, Mistral, Qwen, Gemma, SmolLM and the many that follow them
    "self_attn.q_proj": ("q", "attention"),
    "self_attn.k_proj": ("k", "attention"),
    "self_attn.v_proj": ("v", "attention"),
    "self_attn.o_proj": ("o", "attention"),
    "mlp.gate_proj": ("gate", "mlp"),
    "mlp.up_proj": ("up", "mlp"),
    "mlp.down_proj": ("down", "mlp"),
    # BERT, RoBERTa, ELECTRA and kin
    "attention.self.query": ("q", "attention"),
    "attention.self.key": ("k", "attention"),
    "attention.self.value": ("v", "attention"),
    "attention.output.dense": ("o", "attention"),
    "intermediate.dense": ("up", "mlp"),
    "output.dense": ("down", "mlp"),
}
_ENDINGS = sorted(_ROLES, key=len, reverse=True)
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class SiteMap(Sequence[Site]):
    """All sites of a model, in the order of its modules."""

    def __init__(self, model: nn.Module) -> None:
        skip = {id(module) for module in head_modules(model).values()}
        self._sites = [
            _site(path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in skip
        ]
        self._by_path = {site.path: site for site in self._sites}
        self._all_paths = [path for path, _ in model.named_modules() if path]

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def resolve(self, targets: str | Sequence[str]) -> list[Site]:
        """The sites that ``targets`` pick, in the model's order.

        A target is ``all-linear`` (every linear map inside the layers; in a model without layers, every one), a
        group (``attention``, ``mlp``), a role (``q``, ``up`` …), or a module's path or the end of one
        (``q_proj``, ``attention.self.query``).

        Raises:
            TargetError: a target picks no site; the message names the nearest that would.
        """
        wanted = [targets] if isinstance(targets, str) else list(targets)
        if not wanted:
            raise TargetError("No targets given; 'all-linear' picks every linear map inside the layers.")
        chosen: set[str] = set()
        for target in wanted:
            paths = self._matches(target)
            if not paths:
                raise TargetError(
                    f"Target {target!r} matches nothing in this base.{did_you_mean(target, self.words())} "
                    f"It has: {', '.join(self.words()) or 'no linear maps'}."
                )
            chosen.update(paths)
        return [site for site in self._sites if site.path in chosen]

    def words(self) -> list[str]:
        """The words that pick something here: groups, roles and the last parts of module names."""
        found: dict[str, None] = {ALL_LINEAR: None} if self._sites else {}
        for kind in ("group", "role"):
            found.update({getattr(site, kind): None for site in self._sites if getattr(site, kind)})
        found.update({site.path.rpartition(".")[2]: None for site in self._sites})
        return list(found)

    def shortest_names(self, sites: Sequence[Site]) -> list[str]:
        """The shortest endings of module paths that pick exactly these sites among all modules of the model."""
        wanted = {site.path for site in sites}
        depth = max((path.count(".") + 1 for path in wanted), default=0)
        for parts in range(1, depth):
            names = {".".join(path.split(".")[-parts:]) for path in wanted}
            endings = tuple("." + name for name in names)
            if {path for path in self._all_paths if ("." + path).endswith(endings)} == wanted:
                return sorted(names)
        return sorted(wanted)

    def _matches(self, target: str) -> list[str]:
        if target in self._by_path:
            return [target]
        if target == ALL_LINEAR:
            inside = [site.path for site in self._sites if site.layer is not None]
            return inside or [site.path for site in self._sites]
        return [
            site.path for site in self._sites if target in (site.role, site.group) or site.path.endswith("." + target)
        ]


def _site(path: str, module: nn.Linear) -> Site:
    role, group = next((_ROLES[end] for end in _ENDINGS if ("." + path).endswith("." + end)), (None, None))
    layer = _LAYER.search(path)
    return Site(path, module.in_features, module.out_features, role, group, int(layer[1]) if layer else None)


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where transformers names no backbone in it."""
    prefix = getattr(model, "base_model_prefix", "")
    found = getattr(model, prefix, model) if prefix else model
    return found if isinstance(found, nn.Module) else model


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules beside the backbone that hold parameters of their own (a classifier, an output projection)."""
    inside = {id(module) for module in backbone(model).modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    }
