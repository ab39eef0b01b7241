"""Selected rows of the token embeddings, as in peft's trainable tokens.

    E[ids] ← v        v ∈ R^{n×d} a copy of those rows at the start: bit-equal to the base

Wherever the table is used: in the input embedding, a decoder's, and the output projection where it shares the weight.
Merges. Trained and stored: n · d numbers.

`tokens` are ids, or texts that the base's tokenizer has as one token each. The base keeps its vocabulary: many have
tokens to spare (special ones that pretraining left unused), and these need nothing else. For tokens of one's own,
enlarge the base once, before anything is attached, and keep it:

    base = veneer.load_base("smollm2-135m-instruct")
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>"]})
    base.model.resize_token_embeddings(len(base.tokenizer))
    base.model.save_pretrained("with-calls"), base.tokenizer.save_pretrained("with-calls")

after which "with-calls" is the base to load and to train on, with ``tokens: ["<call>", "</call>"]``. An output
projection that doesn't share the weight isn't trained: such a base reads the tokens, but learns to write them only in
full fine-tuning.

Use it to give tokens a meaning, mostly beside another method (`mix`); by itself it can teach little else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.bases.sites import owner_of
from veneer.deltas import Delta, OfWeight
from veneer.errors import AdapterFileError, TargetError
from veneer.methods.base import BaseWeights, Lowering, Method, widened

_ROWS = "trainable_tokens_delta"  # peft's name; it holds the rows themselves


class TokenRows(Method):
    """Selected rows of the token embeddings."""

    name: ClassVar[str] = "tokens"
    example: ClassVar[Mapping[str, Any]] = {"tokens": [5]}
    summary: ClassVar[str] = "trains the embeddings of selected tokens"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    peft_names: ClassVar[Mapping[str, str]] = {"token_indices": "tokens"}

    tokens: tuple[int | str, ...] = Field(min_length=1)
    """Which: ids, or texts of one token each, e.g. ["<|im_start|>", 7]."""

    def rate(self, name: str) -> float:
        """A head has to do most of the work, and wants a higher one."""
        return 0.1

    def on(self, base: BaseWeights) -> Method:
        """With ids in place of texts."""
        ids = [token if isinstance(token, int) else _id_of(token, base.tokenizer) for token in self.tokens]
        if twice := sorted({token for token in ids if ids.count(token) > 1}):
            raise TargetError(f"tokens names token {twice[0]} more than once.")
        return self.model_copy(update={"tokens": tuple(ids)})

    def meets(self) -> Collection[int]:
        """All of them."""
        return {token for token in self.tokens if isinstance(token, int)}

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The modules that use the table.

        Raises:
            TargetError: the base reads no tokens, or has no token of some id.
        """
        found = sites.token_tables
        size = found[0].in_features
        if beyond := [token for token in self.tokens if isinstance(token, int) and not 0 <= token < size]:
            raise TargetError(
                f"This base has {size} token embeddings, and none for token {beyond[0]}. If the tokenizer has it, the "
                "base has to be enlarged (model.resize_token_embeddings(len(tokenizer))) and saved as one of its own."
            )
        return found

    def shared(self, sites: Sequence[Any], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """The rows ``[n, d]``, under peft's name for them."""
        table = base.parameters(sites[0])["weight"].detach()
        rows = table[torch.tensor(self.tokens, device=table.device)]
        owner = owner_of(base.model, base.model.get_submodule(sites[0].path))
        return {f"base_model.model.{owner}.{_ROWS}": widened(rows).clone()}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The table with these rows in it."""
        (rows,) = parameters.values()
        ids = torch.tensor(self.tokens, device=rows.device)
        return OfWeight(lambda weight: weight.index_copy(0, ids, rows.to(weight.dtype)), held=rows.nbytes)

    def to_peft(self, sites: Sequence[Site], site_map: SiteMap) -> dict[str, Any]:
        """With the embedding by name; peft finds by itself what shares its weight."""
        return {"token_indices": list(self.tokens), "target_modules": [site_map.token_table]}

    @classmethod
    def read(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """peft writes the rows again for every module that shares them."""
        targets = config.get("target_modules") or ()
        names = [targets] if isinstance(targets, str) else list(targets)
        endings = tuple(f".{name}.{_ROWS}" for name in names)
        found = any(key.endswith(endings) for key in state)
        return {key: value for key, value in state.items() if not found or not _is_rows(key) or key.endswith(endings)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Refuses none."""
        if not config.get("token_indices"):
            raise AdapterFileError("This adapter of trainable tokens names no tokens (token_indices).")
        return super().from_peft(config)


def _is_rows(key: str) -> bool:
    return key.endswith(f".{_ROWS}")


def _id_of(text: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise TargetError(f"Token {text!r} is given by its text, but the base has no tokenizer; give its id.")
    found = tokenizer.convert_tokens_to_ids(text)
    if found is not None and (found != tokenizer.unk_token_id or text == tokenizer.unk_token):
        return int(found)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
    raise TargetError(
        f"{text!r} is no token of this base: its tokenizer makes it {pieces}. To make it one, add it to the tokenizer "
        "(tokenizer.add_special_tokens), enlarge the base (model.resize_token_embeddings) and save both as a base of "
        "its own; `veneer methods tokens` shows how."
    )
