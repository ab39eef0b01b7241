"""Methods whose parameters come to embeddings of virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from veneer.bases import SiteMap
from veneer.bases.site import Site
from veneer.methods.base import Method

TABLE = "prompt_embeddings"
"""What peft calls the embeddings in files, ``[l, d]``."""


class VirtualTokens(Method):
    """A method with virtual tokens in the input."""

    peft_prefix: ClassVar[str] = "base_model."

    length: int = Field(20, ge=1)
    """How many virtual tokens."""

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The input embedding."""
        return [sites.input_embedding]

    @classmethod
    def read(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """For an encoder-decoder peft keeps a second table as long, and never uses it."""
        length = config.get("num_virtual_tokens")
        return {key: value[:length] if key.endswith(TABLE) else value for key, value in state.items()}

    def to_peft(self, sites: Sequence[Any], site_map: SiteMap) -> dict[str, Any]:
        """With the sizes peft makes its table by."""
        return {
            "task_type": site_map.peft_task,  # without which peft would load it and leave it out
            "num_virtual_tokens": self.length,
            "token_dim": sites[0].out_features,
            "num_transformer_submodules": 1,
        }
