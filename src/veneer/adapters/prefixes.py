"""Prefix keys and values, by transformers' attention interface; and the positions that shift with them.

While a plan has prefixes, the base's configs name an attention function of ours, which prepends the prefix's keys
and values, extends the mask, and calls the function that was named before. Positions of the real tokens start
after the prefix: as in peft, a prefix of length P takes positions 0 … P−1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.bases.families import stack_of
from veneer.bases.fast import SDPA, sdpa
from veneer.deltas import KeyValues
from veneer.deltas.attention import padded
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.execution import Execution

_PREFIXED = "veneer_prefix_"
_WRAPPED = (SDPA, "eager")


class AttentionHooks:
    """Marks an attention module, so that the attention function finds the plan from the module alone."""

    def __init__(self, path: str, execution: Execution, distances: nn.Module | None = None) -> None:
        self.path = path
        self.execution = execution
        self.distances = distances
        """What biases this attention by distance (T5)."""

    def install(self, module: nn.Module) -> list[Any]:
        """Register the mark; the handle removes it again."""
        return [module.register_forward_pre_hook(self.mark)]

    def mark(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Nothing: being there is enough."""


class PositionHooks:
    """Shifts the positions a module turns into embeddings or angles by the lengths of the prefixes."""

    def __init__(self, path: str, execution: Execution) -> None:
        self.path = path
        self.execution = execution

    def install(self, module: nn.Module) -> list[Any]:
        """Register the hook; the handle removes it again."""
        return [
            module.register_forward_pre_hook(self.shift, with_kwargs=True),
            module.register_forward_hook(self.spread, with_kwargs=True),
        ]

    def lengths(self) -> Tensor | None:
        """Of the prefixes in its stack: ``[1, 1]``, or ``[rows, 1]`` where they differ; None without prefixes."""
        lengths = self.execution.plan.prefix_lengths(stack_of(self.path))
        return None if lengths is None else torch.tensor(lengths)[:, None]

    def shift(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the lengths to the positions, wherever among the arguments they are."""
        lengths = self.lengths()
        if lengths is None:
            return None
        if isinstance(module, nn.Embedding) and "past_key_values_length" not in _signature(module):
            return (_shifted(args[0], lengths), *args[1:]), kwargs
        if lengths.numel() > 1 and "past_key_values_length" in _signature(module):
            return None  # takes one offset for all rows: `spread` looks the rows' own positions up
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        name = "position_ids" if bound.arguments.get("position_ids") is not None else "past_key_values_length"
        before = bound.arguments.get(name, 0)
        bound.arguments[name] = _shifted(before, lengths) if isinstance(before, Tensor) else before + int(lengths)
        return bound.args, bound.kwargs

    def spread(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Learned positions that start at an offset, one for all rows: look up those of each row instead."""
        lengths = self.lengths()
        if lengths is None or lengths.numel() == 1 or "past_key_values_length" not in _signature(module):
            return None
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        places = given.get("position_ids")
        if places is None:
            first = int(given.get("past_key_values_length", 0))
            places = torch.arange(first, first + output.shape[-2], device=output.device)
        if places.dim() == 1:
            places = places.expand(next(iter(given.values())).shape[0], -1)
        places = _shifted(places, lengths) + int(getattr(module, "offset", 0))
        return nn.functional.embedding(places, module.weight)  # type: ignore[arg-type]


def _shifted(positions: Tensor, lengths: Tensor) -> Tensor:
    """Positions ``[1 or rows, n]`` (or ``[n]``) plus each row's length."""
    if lengths.numel() == 1:
        return positions + int(lengths)
    return positions + lengths.to(positions.device)


def _signature(module: nn.Module) -> Iterable[str]:
    return inspect.signature(module.forward).parameters


def switch_on(configs: Sequence[Any]) -> list[tuple[Any, str]]:
    """Name our attention functions in the configs; what to give to `switch_off`."""
    _register()
    before = [(config, config._attn_implementation) for config in configs]
    for _, name in before:
        if name not in _WRAPPED:
            raise AdapterError(
                f"Prefixes run with the attention implementations {' and '.join(_WRAPPED)}, not {name!r}; "
                "load the base with one of them."
            )
    for config, name in before:
        config._attn_implementation_internal = _PREFIXED + name
    return before


def switch_off(before: Sequence[tuple[Any, str]]) -> None:
    """Name the functions that were named before."""
    for config, name in before:
        config._attn_implementation_internal = name


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in _WRAPPED:
        if _PREFIXED + name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(_PREFIXED + name, _attention(name))
            # Without this the mask would come as None, and padding be ignored without a word.
            ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIXED + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _attention(name: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        run = _plain(module, name)
        mark = _mark(module)
        prefix = mark.execution.plan.attention.get(mark.path) if mark else None
        if mark is None or prefix is None:
            return run(module, query, key, value, attention_mask, **kwargs)
        rows = prefix if isinstance(prefix, Sequence) else [prefix]
        keys, values, there = padded(rows, key.dtype)
        if len(rows) not in (1, len(key)):
            raise AdapterError(f"Adapters are given for {len(rows)} rows, but an attention layer sees {len(key)}.")
        keys, values, there = (each.expand(len(key), *each.shape[1:]) for each in (keys, values, there))
        gate = _gate(rows, query)
        mask = _extended(attention_mask, there, query, key, _causal(module, kwargs))
        if (bias := kwargs.get("position_bias")) is not None:
            kwargs["position_bias"] = _nearer(mark.distances, bias, keys.shape[2])
        kwargs["is_causal"] = False  # the mask says it all
        if gate is not None:
            return _gated(run, module, query, (keys, key), (values, value), gate, mask, kwargs)
        return run(module, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), mask, **kwargs)

    return attention


def _gate(rows: Sequence[KeyValues | None], query: Tensor) -> Tensor | None:
    """How far each query sees its row's prefix, ``[rows, queries or 1]``; None where all see theirs fully."""
    if all(prefix is None or prefix.opening is None for prefix in rows):
        return None
    each = rows if len(rows) == len(query) else [*rows] * len(query)  # one prefix for all rows
    gate = query.new_ones(len(query), query.shape[2])
    for prefix in dict.fromkeys(prefix for prefix in each if prefix is not None):
        mine = [row for row, other in enumerate(each) if other is prefix]
        if (opened := prefix.gate(mine)) is not None:
            places = torch.tensor(mine, device=gate.device)
            gate = gate.index_copy(0, places, opened.to(gate.dtype).expand(-1, gate.shape[1]))
    return gate


def _gated(
    run: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    gate: Tensor,
    mask: Tensor,
    kwargs: dict[str, Any],
) -> Any:
    """Attention with the prefix's keys and values multiplied by a gate that differs from query to query.

    Heads of twice the width keep the prefix apart from the real keys: ``[q, g q] · [0, P_k] = g q · P_k`` and
    ``[q, g q] · [k, 0] = q · k``; of what comes out the second half is the prefix's, to be multiplied by g again.
    """
    nothing = [torch.zeros_like(each) for each in (*keys, *values)]
    wide_query = torch.cat([query, query * gate[:, None, :, None]], -1)
    wide_key = torch.cat([torch.cat([nothing[0], keys[0]], -1), torch.cat([keys[1], nothing[1]], -1)], 2)
    wide_value = torch.cat([torch.cat([nothing[2], values[0]], -1), torch.cat([values[1], nothing[3]], -1)], 2)
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    output, weights = run(module, wide_query, wide_key, wide_value, mask, **kwargs)
    real, prefix = output.chunk(2, -1)  # [rows, queries, heads, width]
    return real + prefix * gate[:, :, None, None], weights


def _plain(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function the module would have used: a shared one, or the ``eager`` of its own file."""
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == SDPA:
        return sdpa
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, own)


def _mark(module: nn.Module) -> AttentionHooks | None:
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, AttentionHooks)), None)


def _nearer(distances: Any, bias: Tensor, length: int) -> Tensor:
    """Biases ``[1, heads, queries, keys]`` with those of a prefix, which lies right before the first key."""
    queries, keys = bias.shape[-2:]
    if distances is None:
        more = bias.new_zeros(*bias.shape[:-1], length)
    else:
        before = length + keys - queries  # of the first query
        more = distances.compute_bias(queries, length + keys, bias.device, before)[..., :length]
    return torch.cat([more.to(bias.dtype), bias], -1)


def _causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", False) if asked is None else asked)


def _extended(mask: Tensor | None, there: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The mask with a column for each prefix key: everyone sees those that are there."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device)
        if causal and queries > 1:
            mask = mask.tril(keys - queries)
        mask = mask[None, None]
    columns = there[:, None, None, :].expand(-1, 1, mask.shape[2], -1)
    rows = max(len(mask), len(columns), 1)
    mask, columns = mask[:, :, :, :keys].expand(rows, -1, -1, -1), columns.expand(rows, mask.shape[1], -1, -1)
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        columns = torch.zeros_like(columns, dtype=mask.dtype).masked_fill(~columns, lowest)
    return torch.cat([columns, mask], -1)
