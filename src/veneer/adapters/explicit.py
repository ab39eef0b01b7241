"""Prefix keys and values in the two attentions that don't run through transformers' attention interface.

DeBERTa's (He et al. 2021, arXiv:2006.03654, §3) relates every query to every key by their distance. The prefix is put
before the layer's input as P empty positions, whose keys and values are then written over and whose outputs are
dropped: it lies at the distances of P tokens before the text.

XLNet's (Yang et al. 2019, arXiv:1906.08237, A.1) scores a key by content, distance and segment. A prefix has content
only:

    softmax([ (q + u)·P_k ; (q + u)·k + (q + v)·r + (q + s)·e ] / √d) [P_v; v]
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapters.execution import Execution
from veneer.deltas import KeyValues


class _PrefixHooks:
    """What both share: a prefix that is the plan's for this module, one for all rows (others are split before)."""

    def __init__(self, path: str, execution: Execution) -> None:
        self.path = path
        self.execution = execution

    def prefix(self) -> KeyValues | None:
        found = self.execution.plan.attention.get(self.path)
        return found if isinstance(found, KeyValues) else None


class DisentangledHooks(_PrefixHooks):
    """Hooks of DeBERTa's attention and of its key and value maps."""

    def __init__(self, path: str, execution: Execution) -> None:
        super().__init__(path, execution)
        self._length = 0
        self._to_write: dict[str, Tensor] = {}

    def install(self, module: nn.Module) -> list[Any]:
        """Register all hooks; the handles remove them again."""
        return [
            module.register_forward_pre_hook(self.widen, with_kwargs=True),
            module.key_proj.register_forward_hook(functools.partial(self.write, "key")),  # type: ignore[union-attr]
            module.value_proj.register_forward_hook(functools.partial(self.write, "value")),  # type: ignore[union-attr]
            module.register_forward_hook(self.narrow),
        ]

    def widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Empty positions before the input; mask and distances to match."""
        self._to_write, self._length = {}, 0
        if (prefix := self.prefix()) is None:
            return None
        given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        self._length = length = len(prefix)
        self._to_write = {"key": prefix.key.flatten(1), "value": prefix.value.flatten(1)}
        for name in ("hidden_states", "query_states"):
            if given.get(name) is not None:
                given[name] = F.pad(given[name], (0, 0, length, 0))
        given["attention_mask"] = F.pad(given["attention_mask"], (length, 0, length, 0), value=1)
        if given.get("relative_pos") is not None:
            states = given["hidden_states"]
            given["relative_pos"] = sys.modules[type(module).__module__].build_relative_position(
                states, states, bucket_size=module.position_buckets, max_position=module.max_relative_positions
            )
        return (), given

    def write(self, which: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The prefix in place of what the empty positions gave; later calls (of relative positions) are left alone."""
        if (values := self._to_write.pop(which, None)) is None:
            return None
        return torch.cat([values.to(output.dtype).expand(len(output), -1, -1), output[:, self._length :]], 1)

    def narrow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Without the outputs of the empty positions."""
        if not self._length:
            return None
        states, probabilities = output
        return states[:, self._length :], None if probabilities is None else probabilities[:, :, self._length :]


class RelativeHooks(_PrefixHooks):
    """Hooks of XLNet's attention, which put our core in the place of the module's own for a call."""

    def install(self, module: nn.Module) -> list[Any]:
        """Register both hooks; the handles remove them again."""
        return [
            module.register_forward_pre_hook(self.swap_in),
            module.register_forward_hook(self.swap_out, always_call=True),
        ]

    def swap_in(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Ours."""
        if (prefix := self.prefix()) is not None:
            module.__dict__["rel_attn_core"] = functools.partial(_core, module, prefix)

    def swap_out(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The module's own."""
        module.__dict__.pop("rel_attn_core", None)


def _core(
    module: Any,
    prefix: KeyValues,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    seg_mat: Tensor | None = None,
    attn_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> Any:
    """Queries, keys and values are ``[positions, rows, heads, width]``; so is what comes out."""
    keys, values = prefix.key.to(k.dtype), prefix.value.to(v.dtype)
    content = torch.einsum("ibnd,jbnd->bnij", q + module.r_w_bias, k)
    place = torch.einsum("ibnd,jbnd->bnij", q + module.r_r_bias, r)
    scores = content + module.rel_shift_bnij(place, klen=content.shape[3])
    if seg_mat is not None:
        segment = torch.einsum("ibnd,snd->ibns", q + module.r_s_bias, module.seg_embed)
        scores = scores + torch.einsum("ijbs,ibns->bnij", seg_mat, segment)
    if attn_mask is not None:
        hidden = attn_mask.permute(2, 3, 0, 1).bool()
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    to_prefix = torch.einsum("ibnd,pnd->bnip", q + module.r_w_bias, keys)
    weights = module.dropout((torch.cat([to_prefix, scores], -1) * module.scale).softmax(-1))
    length = len(prefix)
    out = torch.einsum("bnip,pnd->ibnd", weights[..., :length], values)
    out = out + torch.einsum("bnij,jbnd->ibnd", weights[..., length:], v)
    return (out, weights.permute(2, 3, 0, 1)) if output_attentions else out
