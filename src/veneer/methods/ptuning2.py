"""P-tuning v2: deep prompts (Liu et al. 2022, arXiv:2110.07602, §3.2).

    K ← [P_k; K],   V ← [P_v; V]        in every layer

which is prefix tuning for encoders and for tasks of understanding: what is learned, run and stored is the same. The
reparametrising network is left out unless `mlp` asks for it; the paper finds it of use for some tasks only.

Use it for classification and tagging over a frozen encoder that many share; longer prompts for harder tasks.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from veneer.methods.prefix import Prefix


class PTuning2(Prefix):
    """Deep prompts: learned keys and values in every layer."""

    name: ClassVar[str] = "ptuning2"
    summary: ClassVar[str] = "deep prompts: prefix tuning for encoders"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2110.07602"

    length: int = Field(32, ge=1)
    """How many keys and values."""

    @classmethod
    def reads(cls, config: object) -> bool:
        """Never: peft's prefix files are read as `prefix`, which is the same."""
        return False
