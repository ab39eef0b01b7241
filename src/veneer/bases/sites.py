"""Sites: the places in a base where something can act, and the words that pick them.

A site is a module with a role (``q``, ``up`` …), a group (``attention``, ``mlp``), and the index of the layer it
belongs to. Roles come from a table per naming convention; a linear map nobody listed is still a site, without a
role, and can be picked by its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import nn

from veneer.bases.families import (
    Split,
    branch_output,
    counts_positions,
    is_cross_attention,
    is_never_called,
    peft_task,
    positions_first,
    split_of,
    stack_of,
    takes_prefixes,
)
from veneer.bases.scan import sites_of
from veneer.bases.site import EMBEDDING, EXPERTS, AttentionSite, Site, is_expression
from veneer.bases.weights import parameters_of
from veneer.errors import TargetError, did_you_mean

ALL_LINEAR = "all-linear"
_EXPERTS = Split({"hidden_states": 0, "top_k_index": 0, "top_k_weights": 0}, 0)
_MAPS = ("linear", EXPERTS)


class SiteMap(Sequence[Site]):
    """All sites of a model, in the order of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.heads = head_modules(model)
        """The modules beside the backbone, by path."""
        skip = {id(module) for module in self.heads.values()}
        self._modules = dict(model.named_modules())
        self._model = model
        self.token_embedding = input_embedding_of(model)
        inside = {
            path: module
            for path, module in self._modules.items()
            if path and id(module) not in skip and not is_never_called(path)
        }
        self._everything = [site for path, module in inside.items() for site in sites_of(path, module)]
        self._sites = [site for site in self._everything if site.kind == "linear"]
        self._by_path = {site.path: site for site in self._everything}

    @property
    def everything(self) -> Sequence[Site]:
        """All sites with parameters of their own: linear maps, experts, embeddings, convolutions and norms."""
        return self._everything

    @cached_property
    def attention(self) -> Sequence[AttentionSite]:
        """The attention layers, told by their key maps."""
        found: list[AttentionSite] = []
        for site in self._sites:
            if site.role not in ("k", "qkv"):
                continue
            path = site.path.rpartition(".")[0]
            module = self._modules[path]
            width = next((getattr(module, name) for name in _HEAD_WIDTHS if hasattr(module, name)), None)
            if width is None or not takes_prefixes(module):
                continue
            keys = site.out_features if site.role == "k" else _fused_keys(module, site, width)
            query = next(each for each in self._sites if each.role in ("q", "qkv") and each.path.startswith(f"{path}."))
            found.append(
                AttentionSite(
                    path, keys // width, width, site.layer, len(found), self._part(path), query.module,
                    query.in_features,
                )
            )  # fmt: skip
        return found

    def branches(self, group: str) -> Sequence[Site]:
        """The outputs of residual branches (self-``attention`` or ``mlp``), before the residual is added."""
        last = {"attention": "o", "mlp": "down"}[group]
        found: list[Site] = []
        first: Site | None = None  # of the branch
        for site in self._sites:
            first = None if site.group != group else first or site
            if site.role != last or site.parameter is not None:
                continue
            if first is not None and not is_cross_attention(site.path):
                path = branch_output(site.path, self._modules)
                found.append(
                    replace(site, path=path, in_features=first.in_features, kind="branch", source=first.module)
                )
            first = None
        blocks = {site.module.rpartition(".")[0]: site for site in self._everything if site.kind == EXPERTS}
        return found + [
            Site(path, site.out_features, site.out_features, "branch", None, group, site.layer)
            for path, site in blocks.items()
            if group == "mlp"
        ]

    @property
    def whole(self) -> Site:
        """The model itself, all its parameters by their paths."""
        return Site("", 0, 0, "model")

    @property
    def token_table(self) -> str:
        """Path of the module that holds the input embedding's weight; where several share it, the first.

        Raises:
            TargetError: the base has none.
        """
        return owner_of(self._model, self._modules[self.input_embedding.path])

    @cached_property
    def token_tables(self) -> Sequence[Site]:
        """The input embedding, and the modules that share its weight: the decoder's embedding, the output projection.

        Raises:
            TargetError: the base has none.
        """
        first = self.input_embedding
        table = parameters_of(self._modules[first.path])["weight"]
        found = [first]
        for path, module in self._modules.items():
            tied = module._parameters.get("weight") is table
            if path != first.path and tied and not is_never_called(path):
                kind = EMBEDDING if isinstance(module, nn.Embedding) else "linear"
                width = (table.shape[0], table.shape[1]) if kind == EMBEDDING else (table.shape[1], table.shape[0])
                found.append(Site(path, *width, kind))
        return found

    @property
    def input_embedding(self) -> Site:
        """The embedding of the input ids.

        Raises:
            TargetError: the base has none.
        """
        readable = getattr(self._model, "main_input_name", "input_ids") == "input_ids"
        for site in self._everything:
            if readable and self._modules[site.path] is self.token_embedding:
                return site
        raise TargetError("This base has no input embedding: it does not read token ids.")

    @cached_property
    def positions(self) -> Sequence[str]:
        """The modules that turn positions into embeddings or rotary angles."""
        return [
            path
            for path, module in self._modules.items()
            if "RotaryEmbedding" in type(module).__name__ or _counts_positions(path, module)
        ]

    @property
    def learned_positions(self) -> int | None:
        """How many positions a row may have; None where any number will do, because none are learned."""
        tables = [module for path in self.positions if isinstance(module := self._modules[path], nn.Embedding)]
        return min((_counted(table) for table in tables), default=None)

    @cached_property
    def splits(self) -> Mapping[str, Split]:
        """The modules whose rows are run apart where their adapters differ, by path."""
        found = {path: split for path, module in self._modules.items() if (split := split_of(module)) is not None}
        return found | {site.module: _EXPERTS for site in self._everything if site.kind == EXPERTS}

    @property
    def peft_task(self) -> str | None:
        """What peft calls the task this model's class is for."""
        return peft_task(type(self._model).__name__)

    def distances(self, path: str) -> nn.Module | None:
        """The module that biases attention at ``path`` by distance, where the layers of a stack share one."""
        stack = stack_of(path)
        if is_cross_attention(path):
            return None
        found = (module for at, module in self._modules.items() if stack_of(at) == stack)
        return next((module for module in found if getattr(module, "has_relative_attention_bias", False)), None)

    def is_causal(self, path: str) -> bool:
        """Whether tokens see only those before them: in a decoder, and where the nearest attention says so."""
        parts = path.split(".")

        def nearness(site: AttentionSite) -> int:
            pairs = zip(site.path.split("."), parts, strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

        near = max(self.attention, key=nearness, default=None)
        causal = near is not None and bool(getattr(self._modules[near.path], "is_causal", False))
        return causal or self.in_decoder(path)

    def is_cross_attention(self, path: str) -> bool:
        """Whether it lies in a decoder's attention to the encoder."""
        return is_cross_attention(path)

    def input_of(self, path: str) -> str:
        """A name for the input of a module, the same for linear maps that get the very same: queries, keys and values
        of tokens attending to each other, keys and values of what a decoder attends to, gate and value of a layer."""
        site, parent = self._by_path.get(path), path.rpartition(".")[0]
        shared = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gated", "up": "gated"}
        if site is None or site.role not in shared:
            return path
        split = self.splits.get(parent)
        if site.role == "q" and (is_cross_attention(path) or "cross" in path):
            return path
        if site.role == "v" and split is not None and split.attention == "disentangled":
            return path  # its queries and keys are made of positions, too
        return f"{parent}:{shared[site.role]}"

    def in_decoder(self, path: str) -> bool:
        """Whether it lies in the decoder of an encoder-decoder."""
        return self._part(path) in ("decoder", "cross")

    def _part(self, path: str) -> str | None:
        if not getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            return None
        return "cross" if is_cross_attention(path) else "decoder" if "decoder" in stack_of(path) else "encoder"

    def row_axis(self, path: str) -> int:
        """Which axis of the module's input is the batch."""
        return 1 if positions_first(self._model) and ("." + path).startswith(".transformer.") else 0

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def resolve(
        self,
        targets: str | Sequence[str],
        *,
        exclude: str | Sequence[str] = (),
        layers: str | None = None,
        kinds: Collection[str] | None = None,
        words: Mapping[str, str] | None = None,
    ) -> list[Site]:
        """The sites that ``targets`` pick, in the model's order.

        A target is ``all-linear`` (every linear map inside the layers; in a model without layers, every one), a
        group (``attention``, ``mlp``, ``experts``), a role (``q``, ``up`` …), or a module's path or the end of one
        (``q_proj``, ``attention.self.query``), or a regular expression between slashes (``/layers\\.[02]\\./``) to be
        found in the path. What ``exclude`` picks is left out, and so is what lies outside the slice ``layers``. An
        expression picks among the sites of these ``kinds`` only. ``words`` are further ones, with the expressions that
        they stand for.

        Raises:
            TargetError: a target or an exclusion picks no site; the message names the nearest that would.
        """
        further = words or {}
        chosen = self._union(targets, kinds, further) - (self._union(exclude, kinds, further) if exclude else set())
        if layers is not None:
            chosen &= self._in_layers(layers)
        if not chosen:
            without = f" without exclude={exclude!r}" if exclude else ""
            among = f" in layers={layers!r} of the layers 0 to {self._layer_count - 1}" if layers is not None else ""
            raise TargetError(f"Nothing is left of targets={targets!r}{without}{among}.")
        return [site for site in self._everything if site.path in chosen]

    def _union(
        self, targets: str | Sequence[str], kinds: Collection[str] | None, further: Mapping[str, str]
    ) -> set[str]:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        if not wanted:
            raise TargetError("No targets given; 'all-linear' picks every linear map inside the layers.")
        chosen: set[str] = set()
        for target in wanted:
            paths = self._matches(further.get(target, target), kinds)
            if not paths:
                known = [*further, *self.words()]
                raise TargetError(
                    f"Target {target!r} matches nothing in this base.{did_you_mean(target, known)} "
                    f"It has: {', '.join(known) or 'no linear maps'}."
                )
            chosen.update(paths)
        return chosen

    def _in_layers(self, layers: str) -> set[str]:
        try:
            start, stop = (int(end) if end.strip() else None for end in layers.split(":"))
        except ValueError:
            raise TargetError(f'layers={layers!r} is no slice; write "0:6", "8:" or "-4:".') from None
        inside = range(self._layer_count)[start:stop]
        if not inside:
            raise TargetError(
                f"layers={layers!r} picks none of this base's {self._layer_count} layers, 0 to {self._layer_count - 1}."
                if self._layer_count
                else f"layers={layers!r}, but this base has no layers; set it to null."
            )
        return {site.path for site in self._everything if site.layer in inside}

    @property
    def _layer_count(self) -> int:
        return 1 + max((site.layer for site in self._everything if site.layer is not None), default=-1)

    def words(self) -> list[str]:
        """The words that pick something here: groups, roles and the last parts of module names."""
        found: dict[str, None] = {ALL_LINEAR: None} if self._sites else {}
        for kind in ("group", "role"):
            found.update({getattr(site, kind): None for site in self._everything if getattr(site, kind)})
        found.update({site.path.rpartition(".")[2]: None for site in self._everything if site.kind in _MAPS})
        return list(found)

    def shortest_names(self, sites: Sequence[Site]) -> list[str]:
        """The shortest endings of module paths that pick exactly these sites among all modules of the model."""
        wanted = {site.path for site in sites}
        bare = [site.path for site in self._everything if site.parameter is not None]
        depth = max((path.count(".") + 1 for path in wanted), default=0)
        for parts in range(1, depth):
            names = {".".join(path.split(".")[-parts:]) for path in wanted}
            endings = tuple("." + name for name in names)
            if {path for path in (*self._modules, *bare) if path and ("." + path).endswith(endings)} == wanted:
                return sorted(names)
        return sorted(wanted)

    def _matches(self, target: str, kinds: Collection[str] | None) -> list[str]:
        if target in self._by_path:
            return [target]
        if is_expression(target):
            fitting = (site for site in self._everything if kinds is None or site.kind in kinds)
            return [site.path for site in fitting if site.answers_to(target)]
        if target == ALL_LINEAR:
            inside = [site.path for site in self._sites if site.layer is not None]
            return inside or [site.path for site in self._sites]
        named = [site.path for site in self._sites if site.answers_to(target)]
        # Embeddings and convolutions are picked by name only, experts by theirs and as a group.
        return named or [site.path for site in self._everything if site.answers_to(target)]


def input_embedding_of(model: nn.Module) -> nn.Module | None:
    """The embedding of the input ids, if the model reads ids."""
    try:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            model = model.get_encoder()  # type: ignore[operator]
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not transformers', or not a model of tokens
        return None
    return found if isinstance(found, nn.Embedding) else None


def _counted(table: nn.Embedding) -> int:
    """How many positions a table has, without the rows before the first (RoBERTa's, OPT's, BART's)."""
    skipped = table.padding_idx + 1 if table.padding_idx is not None else int(getattr(table, "offset", 0))
    return table.num_embeddings - skipped


def owner_of(model: nn.Module, module: nn.Module) -> str:
    """Path of the first module that has this one's weight."""
    weight = module._parameters["weight"]
    return next(path for path, other in model.named_modules() if other._parameters.get("weight") is weight)


def _counts_positions(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and counts_positions(
        path, learned_with_offset=type(module) is not nn.Embedding
    )


_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "attention_head_dim", "d_head")


def _fused_keys(module: nn.Module, site: Site, width: int) -> int:
    """Width of the keys in a fused map: grouped heads where the module says so, else a third."""
    groups = getattr(module, "num_key_value_groups", 1)
    heads = site.out_features // width  # of queries, keys and values together: g·n + n + n
    return heads // (groups + 2) * width


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
