"""Virtual tokens: placeholders put into the input ids, overwritten at the embedding.

Each row gets its own number of them, before its first real token and in the place of its markers; mask, positions and
labels follow, and the logits at the placeholders are dropped again (a marker has those at the last of its own). During
generation they are put in at the first step; later steps only have their masks and positions moved along with the
cache. In an encoder-decoder they go into the encoder's input, and the decoder's view of the encoder is widened.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.layout import Layout, longest
from veneer.deltas import Tokens
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.execution import Execution

_IGNORED = -100


class TokenHooks:
    """Hooks of the module that reads the ids, of its embedding, and of a decoder that attends to it."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._layout: Layout | None = None
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
        self._layout, self._written = None, False
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
            mask = ids.new_ones(len(ids), ids.shape[1] + max(seen - longest(rows), 0))
        given["attention_mask"] = self.execution.flow.mask = Layout.of(mask, rows, left=left).placed(mask, 1, 0)
        if seen == 0:
            self._layout = layout = Layout.of(mask, rows, ids, left=left)
            self.execution.flow.places = layout.places
            self._embeddings = torch.cat([row.embeddings for row in rows if row is not None])
            given["input_ids"] = layout.placed(ids, _not_padding(reader), int(ids[0, 0]))
            for name, fill, pad in (("labels", _IGNORED, _IGNORED), ("token_type_ids", None, 0)):
                if isinstance(given.get(name), Tensor) and given[name].shape == ids.shape:
                    given[name] = layout.placed(given[name], fill, pad)
        if given.get("position_ids") is not None or (left and "position_ids" in signature.parameters):
            places = (given["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = places[:, -given["input_ids"].shape[1] :]
        return (), given

    def overwrite(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The virtual tokens' embeddings in the placeholders' places."""
        layout, ids = self._layout, args[0]
        if layout is None or self._embeddings is None:
            return None
        slots = layout.slots
        if ids.shape not in (slots.shape, slots.T.shape):
            return None
        self._written = True
        values = self._embeddings.to(output.dtype)
        if ids.shape == slots.shape:
            return output.masked_scatter(slots[..., None], values)
        return output.transpose(0, 1).masked_scatter(slots[..., None], values).transpose(0, 1)  # XLNet

    def drop(self, reader: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the placeholders' logits out again."""
        layout, self._layout = self._layout, None
        if layout is not None and output is not None and not self._written:
            raise AdapterError(f"{type(reader).__name__} reads its ids in a way that virtual tokens don't reach.")
        logits = getattr(output, "logits", None)
        if layout is None or logits is None or logits.dim() != 3 or logits.shape[1] != layout.slots.shape[1]:
            return None
        output["logits"] = logits.gather(1, layout.places[..., None].expand(-1, -1, logits.shape[-1]))
        return output

    def widen(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the decoder see the encoder's states at the placeholders."""
        states = kwargs.get("encoder_hidden_states")
        if self.execution.plan.tokens is None or states is None:
            return None
        rows, mask = self._rows(len(states)), kwargs.get("encoder_attention_mask")
        if mask is None:
            mask = torch.ones(len(states), states.shape[1] - longest(rows), dtype=torch.long, device=states.device)
        return args, {**kwargs, "encoder_attention_mask": Layout.of(mask, rows, left=False).placed(mask, 1, 0)}

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
