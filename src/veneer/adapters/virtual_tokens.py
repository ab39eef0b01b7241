"""Virtual tokens: placeholders put into the input ids, overwritten at the embedding.

Each row gets its own number of them, before its first real token; mask, positions and labels follow, and the
logits at the placeholders are dropped again. During generation they are put in at the first step; later steps
only have their masks and positions moved along with the cache. In an encoder-decoder they go into the encoder's
input, and the decoder's view of the encoder is widened to match.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.deltas import Tokens
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.execution import Execution

_IGNORED = -100


class TokenHooks:
    """Hooks of the module that reads the ids, of its embedding, and of a decoder that attends to it."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._slots: Tensor | None = None
        self._real: Tensor | None = None
        self._embeddings: Tensor | None = None
        self._written = False

    def install(self, reader: nn.Module, embedding: nn.Module, decoder: nn.Module | None) -> list[Any]:
        """Register all hooks; the handles remove them again."""
        handles = [
            reader.register_forward_pre_hook(self.insert, with_kwargs=True),
            embedding.register_forward_hook(self.overwrite),
            reader.register_forward_hook(self.drop, always_call=True),
        ]
        if decoder is not None:
            handles.append(decoder.register_forward_pre_hook(self.widen, with_kwargs=True))
        return handles

    def insert(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put in placeholders; move mask, labels and positions along."""
        self._slots, self._written = None, False
        if self.execution.plan.tokens is None:
            return None
        signature = inspect.signature(reader.forward)
        given = dict(signature.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        ids = given.get("input_ids")
        if ids is None and given.get("inputs_embeds") is not None:
            raise AdapterError("Virtual tokens go before ids; pass input_ids instead of inputs_embeds.")
        if ids is None:  # a decoder that goes on from the encoder's states
            return None
        rows, past = self._rows(len(ids)), given.get("past_key_values")
        seen = past.get_seq_length() if past is not None else 0
        # Where the last position is what counts, rows end together; else they start together, as positions do.
        last = past is not None or given.get("logits_to_keep") is not None
        left = last or getattr(reader.config, "summary_type", None) == "last"
        mask = given.get("attention_mask")
        if mask is None:
            mask = ids.new_ones(len(ids), ids.shape[1] + max(seen - _longest(rows), 0))
        first = mask.long().argmax(-1).tolist()  # of the real tokens, in each row

        def inserted(values: Tensor, fill: Any, pad: Any) -> Tensor:
            return _inserted(values, rows, first, fill, pad, left=left)

        given["attention_mask"] = self.execution.flow.mask = inserted(mask, 1, 0)
        if seen == 0:
            nothing = torch.zeros_like(ids, dtype=torch.bool)
            self._slots, self._real = inserted(nothing, True, False), inserted(~nothing, False, False)
            self._embeddings = torch.cat([row.embeddings for row in rows if row is not None])
            given["input_ids"] = inserted(ids, _not_padding(reader), int(ids[0, 0]))
            for name, fill in (("labels", _IGNORED), ("token_type_ids", 0)):
                if isinstance(given.get(name), Tensor) and given[name].shape == ids.shape:
                    given[name] = inserted(given[name], fill, fill)
        if given.get("position_ids") is not None or (left and "position_ids" in signature.parameters):
            places = (given["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = places[:, -given["input_ids"].shape[1] :]
        return (), given

    def overwrite(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The virtual tokens' embeddings in the placeholders' places."""
        slots, ids = self._slots, args[0]
        if slots is None or self._embeddings is None or ids.shape not in (slots.shape, slots.T.shape):
            return None
        self._written = True
        values = self._embeddings.to(output.dtype)
        if ids.shape == slots.shape:
            return output.masked_scatter(slots[..., None], values)
        return output.transpose(0, 1).masked_scatter(slots[..., None], values).transpose(0, 1)  # XLNet

    def drop(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the placeholders' logits out again."""
        slots, real, self._slots = self._slots, self._real, None
        if slots is not None and output is not None and not self._written:
            raise AdapterError(f"{type(reader).__name__} reads its ids in a way that virtual tokens don't reach.")
        logits = getattr(output, "logits", None)
        if slots is None or real is None or logits is None or logits.dim() != 3 or logits.shape[1] != slots.shape[1]:
            return None
        order = real.long().argsort(dim=-1, descending=True, stable=True)[:, : int(real[0].sum())]
        output["logits"] = logits.gather(1, order[..., None].expand(-1, -1, logits.shape[-1]))
        return output

    def widen(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the decoder see the encoder's states at the placeholders."""
        states = kwargs.get("encoder_hidden_states")
        if self.execution.plan.tokens is None or states is None:
            return None
        rows, mask = self._rows(len(states)), kwargs.get("encoder_attention_mask")
        if mask is None:
            mask = torch.ones(len(states), states.shape[1] - _longest(rows), dtype=torch.long, device=states.device)
        first = mask.long().argmax(-1).tolist()
        return args, {**kwargs, "encoder_attention_mask": _inserted(mask, rows, first, 1, 0, left=False)}

    def _rows(self, seen: int) -> list[Tokens | None]:
        """The virtual tokens of each row the module sees."""
        tokens = self.execution.plan.tokens
        rows = list(tokens) if isinstance(tokens, Sequence) else [tokens] * seen
        if len(rows) != seen:
            raise AdapterError(f"Adapters are given for {len(rows)} rows, but the batch has {seen}.")
        return rows


def _not_padding(reader: nn.Module) -> int:
    """An id that no mask or pooling takes for padding."""
    return 0 if getattr(getattr(reader, "config", None), "pad_token_id", None) != 0 else 1


def _longest(rows: Sequence[Tokens | None]) -> int:
    return max(len(row) for row in rows if row is not None)


def _inserted(
    values: Tensor, rows: Sequence[Tokens | None], first: Sequence[int], fill: Any, pad: Any, *, left: bool
) -> Tensor:
    """``values`` ``[rows, n]`` with each row's placeholders before its first real token, padded to one length."""
    longest = _longest(rows)
    result = []
    for row, tokens, start in zip(values, rows, first, strict=True):
        length = len(tokens) if tokens is not None else 0
        padding = row.new_full((longest - length,), pad)
        filled = torch.cat([row[:start], row.new_full((length,), fill), row[start:]])
        result.append(torch.cat([padding, filled] if left else [filled, padding]))
    return torch.stack(result)
