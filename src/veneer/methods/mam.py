"""MAM adapters, "mix-and-match" (He et al. 2022, arXiv:2110.04366, §4.6).

A short prefix in every attention layer, and a wide scaled parallel adapter beside every feed-forward branch: the
paper's answer to which part of a layer is best changed how. As there: a prefix of 30, reparametrised through a
network of width 800 in training, m = 512, s = 4. The numbers are those of `prefix` and `parallel`; not mergeable, no
identity.

Use it for summaries and translation with an encoder-decoder, where the paper found it equal to full fine-tuning at
6.7 % of its numbers; it is no small adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from veneer.methods.base import Method
from veneer.methods.mixture import Mixture
from veneer.methods.parallel import Parallel
from veneer.methods.prefix import Prefix


class MAM(Mixture):
    """A short prefix and a wide scaled parallel adapter."""

    name: ClassVar[str] = "mam"
    summary: ClassVar[str] = "mix-and-match: a short prefix and wide scaled parallel adapters"
    paper: ClassVar[str] = "He et al. 2022, arXiv:2110.04366"
    peft_type: ClassVar[str] = "VENEER_MAM"

    learning_rate: ClassVar[float] = 2e-4

    length: int = Field(30, ge=1)
    """How many keys and values the prefix has."""
    mlp: bool = True
    """Whether a network makes the prefix while it is trained."""
    mlp_width: int = Field(800, ge=1)
    """Of the network's hidden layer."""
    bottleneck: int = Field(512, ge=1)
    """Width m of the parallel adapter."""
    scale: float = Field(4.0, gt=0)
    """Its factor s."""

    def members(self) -> Sequence[Method]:
        """The two."""
        return _members(self.length, self.mlp, self.mlp_width, self.bottleneck, self.scale)

    def rate(self, name: str) -> float:
        """A fifth of what each learns best at alone: at those, together, they learned nothing on MiniLM, and at a third
        in one of three seeds."""
        return super().rate(name) / 5


@functools.cache  # asked for at every site in every step
def _members(length: int, mlp: bool, mlp_width: int, bottleneck: int, scale: float) -> tuple[Method, ...]:
    prefix = Prefix(length=length, mlp=True, mlp_width=mlp_width) if mlp else Prefix(length=length)
    return prefix, Parallel(bottleneck=bottleneck, scale=scale)
